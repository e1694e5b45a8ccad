"""`${…}` in a YAML means what OmegaConf makes of it."""

import pytest

from open_lm.errors import ConfigError
from open_lm.evaluate.tasks.interpolation import resolved

VALUES = {
    "max_seq_len": 2048,
    "variables": {"folder": "eval/${variables.name}", "name": "local", "shots": [0, 5]},
    "icl_tasks": [
        {"dataset_uri": "${variables.folder}/copa.jsonl", "num_fewshot": ["${variables.shots[1]}"]},
        {"max_seq_len": "${max_seq_len}", "again": "${icl_tasks[0].dataset_uri}", "user": "${oc.env:NO_SUCH,nobody}"},
    ],
    "all": "${variables}",
    "home": "${oc.env:HOME_OF_TEST}",
    "plain": "$5 {x}",
}


def test_it_is_what_omegaconf_makes_of_it(monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    monkeypatch.setenv("HOME_OF_TEST", "/home/me")
    expected = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.create(VALUES), resolve=True)
    assert resolved(VALUES, "a.yaml") == expected
    assert expected["icl_tasks"][0] == {"dataset_uri": "eval/local/copa.jsonl", "num_fewshot": [5]}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("${nothing}", r"a.yaml: \$\{nothing\}: there is no 'nothing'"),
        ("${list[3]}", "there is no '3'"),
        ("${a}", "refers to itself"),
        ("x ${a}", "refers to itself"),
        ("${oc.env:NO_SUCH_VARIABLE}", "not set"),
        ("${oc.decode:x}", "not known"),
        ("${open", "cannot be read"),
    ],
)
def test_what_names_nothing_is_refused(value, said):
    with pytest.raises(ConfigError, match=said):
        resolved({"a": value, "list": [1]}, "a.yaml")

"""Mutants: each planted bug, one at a time, in a copy of the code, against the tests that should notice.

    make mutants                                   # all; writes mutants.json
    python tests/mutants --only masking --json mutants.json

torch is imported once; every mutant is a fork of that process, with its own open_lm. A mutant counts as noticed when a
test fails with it and the same test holds without it. Those that the file given with --json says were noticed are not
run again: stop it at any time, then start it again.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))

from planted import PLANTED  # noqa: E402
from planted_meshes import IN_MESHES  # noqa: E402

ALL = PLANTED + IN_MESHES

SLOW = ("commands", "faults", "parallel", "ownership", "remote", "moe", "checkpoint", "icl")
"""Parts of the names of tests that start processes, or are many: their mutants come last."""

SURVIVE_FOR: dict[str, str] = {}
"""Mutants that no test can notice, by their new text, and why."""


def copied(folder):
    """A copy of the tracked and new files; what is beside the repository is found from there too."""
    names = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "-c", "-o", "--exclude-standard"], capture_output=True, check=True
    ).stdout
    for name in filter(None, names.decode().split("\0")):
        source, target = ROOT / name, folder / "code" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_file():
            shutil.copyfile(source, target)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to((ROOT.parent / "shared").resolve())
    return folder / "code"


def import_what_is_slow():
    """Import the packages that every test needs and no mutant changes."""
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def noticed(code, mutant, seconds):
    """Whether a test fails (or does not end) with the bug, and ends well without; which one."""
    path = code / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {text.count(mutant.old)} times {mutant.old!r}"
    words = [re.sub(r"\bnot_", "not ", word) for word in shlex.split(mutant.tests)]
    words += [] if "-m" in words else ["-m", "not slow"]
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        ended, failed = _tested(code, words, seconds)
    finally:
        path.write_text(text)
    if ended == 0:
        return False, ""
    again, _ = _tested(code, [failed] if failed else words, seconds)
    what = failed or (f"no end after {seconds:.0f} s" if ended is None else f"exit {ended}")
    return again == 0, what if again == 0 else f"{what}: also without the bug"


def _tested(code, words, seconds):
    """The exit code of pytest, None where it does not end in time; the first test that failed."""
    output = code.parent / "output"
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(code)
        sys.path[:] = [str(code), str(code / "tests"), *(p for p in sys.path if not p.startswith(str(ROOT)))]
        os.environ |= {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *words]))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            lines = output.read_text(errors="replace").splitlines()
            failed = [
                line.split(" ", 1)[1].split(" - ")[0]
                for line in lines
                if line.startswith(("FAILED tests/", "ERROR tests/"))
            ]
            if status and not failed:
                print("\n".join(lines[-30:]), flush=True)
            return os.waitstatus_to_exitcode(status), (failed or [""])[0]
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, ""


def _key(row):
    return row["file"], row["old"], row["new"]


def _seen_before(path):
    """By its key each row that an earlier run wrote of what is still planted."""
    planted = {_key(mutant._asdict()) for mutant in ALL}
    rows = json.loads(path.read_text()) if path is not None and path.exists() else []
    return {_key(row): row for row in rows if _key(row) in planted}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants with this in file, texts or tests")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts, to run several at once")
    parser.add_argument("--seconds", type=float, default=600, help="tests are given up after so long")
    parser.add_argument(
        "--for", type=float, default=float("inf"), dest="limit", help="begin none after so many seconds"
    )
    parser.add_argument("--json", type=Path)
    arguments, first = parser.parse_args(), time.monotonic()
    chosen = [mutant for mutant in ALL if arguments.only in " ".join(mutant)]
    part, n_parts = map(int, arguments.part.split("/"))
    chosen = chosen[part - 1 :: n_parts]
    rows = _seen_before(arguments.json)
    left = [m for m in chosen if not rows.get(_key(m._asdict()), {"noticed": False})["noticed"]]
    left.sort(key=lambda m: (_key(m._asdict()) in rows, sum(word in m.tests for word in SLOW)))
    import_what_is_slow()
    with tempfile.TemporaryDirectory() as folder:
        code = copied(Path(folder))
        for mutant in left:
            if (began := time.monotonic()) > first + arguments.limit:
                break
            is_noticed, how = noticed(code, mutant, arguments.seconds)
            rows[_key(mutant._asdict())] = {**mutant._asdict(), "noticed": is_noticed, "how": how}
            print(
                f"{'noticed ' if is_noticed else 'SURVIVED'} {len(rows)}/{len(ALL)} {mutant.file}: "
                f"{mutant.new.strip()[:60]!r} ({time.monotonic() - began:.0f} s) {how}", flush=True,
            )  # fmt: skip
            if arguments.json:
                arguments.json.write_text(json.dumps(list(rows.values()), indent=1))
    report(list(rows.values()))


def report(rows):
    """The share that was noticed, and why the others were not."""
    n_noticed = sum(row["noticed"] for row in rows)
    print(f"{n_noticed} of {len(rows)} noticed ({n_noticed / len(rows):.1%})")
    for row in rows:
        if not row["noticed"]:
            print(f"survived: {row['file']}: {row['new'].strip()!r}: {SURVIVE_FOR.get(row['new'], 'no reason known')}")
    sys.exit(n_noticed < 0.95 * len(rows))


if __name__ == "__main__":
    main()

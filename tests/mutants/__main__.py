"""Mutants: each planted bug, one at a time, in a copy of the code, against the tests that should notice.

    make mutants                                   # all; writes mutants.json
    python tests/mutants --only masking --json mutants.json

torch is imported once; every mutant is a fork of that process, with its own open_lm.
"""

import argparse
import json
import os
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
    """Whether a test fails (or never ends) with the bug; the last line of what pytest printed."""
    path = code / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file}: {text.count(mutant.old)} times {mutant.old!r}"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        return _tested(code, mutant.tests, seconds)
    finally:
        path.write_text(text)


def _tested(code, tests, seconds):
    words = [word.replace("not_", "not ") for word in shlex.split(tests)]
    words += [] if "-m" in words else ["-m", "not slow"]
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
            code_of_tests = os.waitstatus_to_exitcode(status)
            lines = [line for line in output.read_text(errors="replace").splitlines() if line.startswith("FAILED")]
            assert code_of_tests in (0, 1) or code_of_tests < 0, output.read_text(errors="replace")[-3000:]
            return code_of_tests != 0, (lines or [""])[0][:160]
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True, f"no end after {seconds} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only mutants with this in file, texts or tests")
    parser.add_argument("--seconds", type=float, default=600, help="tests that take longer count as noticing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in PLANTED + IN_MESHES if arguments.only in " ".join(mutant)]
    chosen.sort(key=lambda mutant: sum(word in mutant.tests for word in SLOW))
    import_what_is_slow()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        code = copied(Path(folder))
        for mutant in chosen:
            began = time.monotonic()
            is_noticed, how = noticed(code, mutant, arguments.seconds)
            rows.append({**mutant._asdict(), "noticed": is_noticed, "how": how})
            print(
                f"{'noticed ' if is_noticed else 'SURVIVED'} {len(rows)}/{len(chosen)} {mutant.file}: "
                f"{mutant.new.strip()[:60]!r} ({time.monotonic() - began:.0f} s) {how}", flush=True,
            )  # fmt: skip
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    n_noticed = sum(row["noticed"] for row in rows)
    print(f"{n_noticed} of {len(rows)} noticed ({n_noticed / len(rows):.1%})")
    for row in rows:
        if not row["noticed"]:
            print(f"survived: {row['file']}: {row['new'].strip()!r}: {SURVIVE_FOR.get(row['new'], 'no reason known')}")
    sys.exit(n_noticed < 0.95 * len(rows))


if __name__ == "__main__":
    main()

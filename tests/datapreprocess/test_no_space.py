"""No space left while shards are made: one line that says so, no shard under its final name, and --resume finishes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LIMITED = (
    "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1]))); sys.argv = sys.argv[2:];"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)


def test_a_full_disk_is_one_line_and_the_work_can_be_resumed(tmp_path, tokenizer_json):
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps({"text": f"document {k} " + "words and words " * 40}) + "\n" for k in range(400)))
    command = [
        str(ROOT / "datapreprocess" / "make_2048.py"),
        "--input-files",
        str(raw),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    command += ["--tokenizer", str(tokenizer_json), "--seqlen", "64", "--num-workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, "40000", *command], capture_output=True, text=True, env=environment
    )
    assert full.returncode not in (0, 1), full.stderr
    assert full.stderr.splitlines()[-1].startswith("error: "), full.stderr
    assert not list(tmp_path.glob("out/*.tar")) and not list(tmp_path.glob("out/manifest.jsonl"))
    again = subprocess.run([sys.executable, *command, "--resume"], capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert ledger["documents"]["tokenized"] == 400

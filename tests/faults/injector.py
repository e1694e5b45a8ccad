"""The injector behind open_lm.faults: a plan of faults, each at an event of one rank, once.

    OPENLM_FAULTS=faults.injector:at  OPENLM_FAULT_PLAN='[{"event": "step", "rank": 1, "step": 5, "do": "kill"}]'

`rank`, `step` (steps taken when it happens), `path` (a part of the value) and `nth` (the nth time all that holds) say
when; `do` says what. What happened is added to the file OPENLM_FAULT_LOG, a JSON line each.
"""

import errno
import json
import os
import signal
import threading
import time

VARIABLES = ("OPENLM_FAULT_PLAN", "OPENLM_FAULT_LOG")
_lock = threading.Lock()
_state = {"step": 0, "seen": {}}


def plan():
    return json.loads(os.environ.get("OPENLM_FAULT_PLAN", "[]"))


def at(event, value):
    rank = int(os.environ.get("RANK", "0"))
    if event == "step":
        _state["step"] = value
    for number, fault in enumerate(plan()):
        if _is_due(number, fault, event, rank, value):
            note(event=event, rank=rank, step=_state["step"], value=str(value)[:200], do=fault["do"])
            value = ACTIONS[fault["do"].partition(":")[0]](value, fault["do"].partition(":")[2])
    return value


def _is_due(number, fault, event, rank, value):
    if fault["event"] not in (event, "any") or fault.get("rank", rank) != rank:
        return False
    if fault.get("step", _state["step"]) != _state["step"] or fault.get("path", "") not in str(value):
        return False
    with _lock:
        count = _state["seen"][number] = _state["seen"].get(number, 0) + 1
    return (
        fault["do"] == "note" or count == fault.get("nth", 1) or (fault.get("always") and count >= fault.get("nth", 1))
    )


def note(**what):
    path = os.environ.get("OPENLM_FAULT_LOG")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps(what | {"time": time.time()}) + "\n")


def signalled(name):
    def send(value, to):
        pid = os.getpid() if not to else os.getppid() if to == "parent" else int(to)
        os.kill(pid, getattr(signal, name))
        return value

    return send


def failing(code):
    def fail(value, _):
        raise OSError(code, os.strerror(code))

    return fail


def scaled(value, factor):
    """The losses, or all gradients of the model, times `factor` (nan and inf too)."""
    if hasattr(value, "parameters"):
        for parameter in value.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(float(factor))
        return value
    return value._replace(total=value.total * float(factor), parts=value.parts * float(factor))


def waiting(value, seconds):
    time.sleep(float(seconds))
    return value


def orphaned(value, _):
    """The process that made this one dies; goes on when it has."""
    parent = os.getppid()
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)
    return value


def killed_in(value, name):
    """This rank dies in the next call of this name of torch.distributed, once the others wait for it."""
    import torch.distributed

    def die(*_, **__):
        time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(torch.distributed, name, die)
    return value


ACTIONS = {
    "note": lambda value, _: value,
    "kill": signalled("SIGKILL"),
    "stop": signalled("SIGSTOP"),
    "kill_in": killed_in,
    "kill_parent": orphaned,
    "term": signalled("SIGTERM"),
    "usr1": signalled("SIGUSR1"),
    "full": failing(errno.ENOSPC),
    "quota": failing(errno.EDQUOT),
    "broken": failing(errno.EIO),
    "sleep": waiting,
    "times": scaled,
}

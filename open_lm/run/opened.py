"""A run opened: its ranks, folder, log and sinks, and how all of them are closed on any exit."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

from open_lm import storage
from open_lm.checkpoint.manager import Checkpoints
from open_lm.checkpoint.remote_sync import RemoteSync
from open_lm.command import report
from open_lm.distributed import World, start_world
from open_lm.errors import DeviceError, OpenLMError
from open_lm.flags import parse_steps
from open_lm.model.config import ModelConfig
from open_lm.params import RunConfig
from open_lm.run.folder import open_folder, remote_folder, run_folder
from open_lm.run.lock import FolderLock
from open_lm.run.profiling import Observer
from open_lm.run.recorder import close_quietly
from open_lm.run.signals import StopRequests, end_with_launcher
from open_lm.run.watchdog import LEEWAY, Watchdog, record_collectives
from open_lm.tracking.log import text_log
from open_lm.tracking.sink import RunFacts, Sink, open_sinks
from open_lm.train.config import mesh_shape

PEER_LEFT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Application timeout caused pair closure",
    "remote process exited",
    "Timed out waiting",
)
"""Words of gloo and NCCL where another rank is gone or stuck."""


class OpenRun:
    """An opened run, before anything is built: its ranks, its folder and checkpoints, its sinks."""

    def __init__(
        self,
        config: RunConfig,
        architecture: ModelConfig,
        world: World,
        folder: str,
        sinks: list[Sink],
        watchdog: Watchdog,
    ):
        self.config, self.architecture, self.world = config, architecture, world
        self.folder, self.sinks, self.watchdog = folder, sinks, watchdog
        self.checkpoints = Checkpoints(
            os.path.join(folder, "checkpoints"),
            config.checkpoint,
            name=os.path.basename(folder),
            config={"model": architecture.to_dict(), "flags": config.as_flags()},
        )
        self.stop_requests = StopRequests(config.train.time_limit_minutes)
        self.observer = Observer(
            folder,
            world.rank,
            profile_steps=parse_steps(config.tracking.profile_steps, "--profile-steps"),
            trace_steps=parse_steps(config.tracking.trace_steps, "--trace-steps"),
        )
        self._copying: Callable[[], object] = lambda: None
        self.is_stuck = False
        """Whether a save did not end although the run did."""
        self.closing = contextlib.ExitStack()
        for sink in sinks:
            self.closing.callback(close_quietly, sink)

    def another(self, config: RunConfig, architecture: ModelConfig) -> OpenRun:
        """A run of `config` that writes where this one does, while this one is open."""
        return OpenRun(config, architecture, self.world, self.folder, self.sinks, self.watchdog)

    def copy_to(self, url: str, stack: contextlib.ExitStack) -> None:
        """Keep a copy of the run at `url` from `begin_copying` until `stack` is closed."""
        if self.world.is_master:
            flags = self.config.checkpoint
            every, grace = flags.remote_sync_frequency, flags.remote_sync_grace
            sync = RemoteSync(self.folder, url, every, self.checkpoints.retention, grace)
            self.checkpoints.copy_logs = sync.copy_logs
            if self.checkpoints.home == self.checkpoints.copy:
                self.checkpoints.require_owner = partial(_each, self.checkpoints.require_owner, sync.require_place)
            self._copying = partial(stack.enter_context, sync)

    def begin_copying(self) -> None:
        """Start the copy, once it is known which checkpoint the run goes on from."""
        self._copying()

    def close(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """Close what writes, as a block ends with `error`."""
        self.watchdog.beat(LEEWAY)
        self.closing.close()
        self.is_stuck = not self.checkpoints.close(is_lost=isinstance(error, DeviceError))
        if self.is_stuck:
            logging.error("the save on its way needs a rank that is gone: leaving without it.")

    def end_if_stuck(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        """End the process where a save waits for a rank that is gone: its thread cannot be stopped, and Python would
        wait for its group. The others see that this rank leaves when its sockets close."""
        if self.is_stuck and isinstance(error, OpenLMError):
            code = report(error)
            sys.stdout.flush()
            os._exit(code)


@contextlib.contextmanager
def start_run(config: RunConfig, architecture: ModelConfig, command: str) -> Iterator[OpenRun]:
    """Open the run that `config` describes, of a model of `architecture`; whatever happens, all is closed.

    Raises:
        ConfigError: the run's folder holds a run and --resume is not given.
        StorageError: the folder cannot be written.
    """
    flags, tracking = config.parallel, config.tracking
    with contextlib.ExitStack() as stack:
        end_with_launcher()
        record_collectives()
        world = stack.enter_context(
            start_world(
                flags.device,
                flags.dist_backend,
                init_method=flags.dist_url,
                timeout_seconds=flags.dist_timeout,
                device_by_rank=not flags.no_set_device_rank,
                force_group=flags.force_distributed,
                mesh=partial(mesh_shape, flags),
            )
        )
        ending = stack.enter_context(contextlib.ExitStack())  # when all else is closed, but for the ranks
        lock = FolderLock(run_folder(config))
        stack.callback(lock.release)
        folder = open_folder(config, world, architecture, lock)
        stack.enter_context(text_log(folder, world.rank, every_rank=tracking.log_local, debug=tracking.debug))
        logging.info("%s", command)
        facts = RunFacts(os.path.basename(folder), folder, config.as_flags(), tracking)
        sinks = open_sinks(facts) if world.is_master else []
        watchdog = Watchdog(folder, world.rank, flags.hang_timeout or 0.8 * flags.dist_timeout)
        run = OpenRun(config, architecture, world, folder, sinks, watchdog)
        ending.push(run.end_if_stuck)
        copy = remote_folder(config)
        run.checkpoints.copy = storage.join(copy, "checkpoints") if copy else None
        if config.trains:
            stack.callback(run.stop_requests.forget)
            stack.enter_context(leaving_together(world))
            run.checkpoints.require_owner = lock.require if world.is_master else run.checkpoints.require_owner
            if copy:
                run.copy_to(copy, stack.enter_context(contextlib.ExitStack()))
            stack.callback(run.stop_requests.note)  # as the run leaves: a signal ends no copy of what is left
        stack.enter_context(watchdog)
        stack.push(run.close)
        try:
            yield run
        except BaseException as error:
            logging.error("the run ended with %s: %s", type(error).__name__, error)
            if lost_contact(error):
                logging.debug("", exc_info=error)
                raise DeviceError(
                    f"lost contact with the other ranks ({error}); see which of them failed first."
                ) from None
            raise


@contextlib.contextmanager
def leaving_together(world: World) -> Iterator[None]:
    """At an end that all ranks come to, none leaves before all can: torchrun ends the others when the first is gone,
    and rank 0 may still copy checkpoints."""
    try:
        yield
    except OpenLMError as error:
        if error.on_all_ranks:
            _wait_for_all(world)
        raise
    _wait_for_all(world)


def _wait_for_all(world: World) -> None:
    try:
        world.wait_for_all()
    except RuntimeError as error:
        logging.warning("another rank left early: %s", error)


def _each(*checks: Callable[[], None]) -> None:
    for check in checks:
        check()


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that another rank has left, which then has a reason of its own to report."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PEER_LEFT)

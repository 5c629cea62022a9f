"""Tracks on a Ray cluster: each a task with the cores, GPUs and memory it asks for. Ray is imported only here."""

from __future__ import annotations

import queue
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.cost import CostRequest, ScoringCost
from harness.errors import UserError
from harness.executors import LocalExecutor, untold
from harness.records import RunRecord
from harness.results import Results, results_at
from harness.track import Event, Track

try:
    import ray
except ImportError as error:
    raise UserError("--executor ray needs Ray: pip install 'adapt-pruner-harness[ray]'") from error


@dataclass(frozen=True)
class Resources:
    """What every track reserves on its node."""

    num_cpus: float = 1
    """Also its threads, unless the track says otherwise."""
    num_gpus: float = 0
    memory: int | None = None
    """Bytes; None reserves what each track is thought to need."""


class RayExecutor:
    """Runs tracks as Ray tasks. A track whose node or worker dies is given to another node, with the runs it lacks.

    The results folder must be the same on every node (a shared file system, or object storage by its URL), and so must
    this package's version.

    Args:
        address: of the cluster, as ``ray.init`` takes it; None starts one on this machine.
        resources: of every track.
        results: where runs go; with a URL, nodes share that and no folder.
        memory_of: bytes that a track is thought to need; None where that is not known.
        attempts: at a track before its missing runs are recorded as failed.

    Raises:
        UserError: the cluster cannot be reached, or has no node with these resources.
    """

    def __init__(
        self,
        address: str | None,
        resources: Resources,
        results: Results,
        memory_of: Callable[[Track], int | None] = lambda _track: None,
        attempts: int = 3,
    ) -> None:
        try:
            _knock(address)
            ray.init(address=address, logging_level="error", log_to_driver=False, ignore_reinit_error=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`") from error
        self.resources = resources
        self.results = results
        self.memory_of = memory_of
        self.attempts = attempts
        self.num_workers = max(1, _slots(resources))
        self._running: set[Any] = set()
        self._lock = threading.Lock()
        self._telling = threading.Lock()

    def cost(self, request: CostRequest) -> ScoringCost:
        """What scoring will cost on a node of the cluster.

        Raises:
            UserError: something the user must mend.
            CostUnknownError: it cannot be estimated for this model.
        """
        try:
            text: str = ray.get(self._task(_cost, self.resources.memory, max_calls=1).remote(request.model_dump_json()))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return ScoringCost.model_validate_json(text)

    def run(self, track: Track, on_event: Callable[[Event], None]) -> None:
        """Run a track to its end; whatever happens to its node, every run of it has a record afterwards.

        Raises:
            UserError: the track met something the user must mend.
        """
        left, reason = {spec.run_id: spec for spec in track.specs}, ""
        store = self.results.store
        before = store.versions(left)

        def hear(event: Event) -> None:
            if event.kind == "finished":
                left.pop(event.run_id, None)
                self.results.pull([event.run_id])
            with self._telling:  # whoever hears need not expect several threads
                on_event(event)

        for _attempt in range(self.attempts):
            if not left:
                return
            try:
                self._run_once(track.model_copy(update={"specs": tuple(left.values())}), hear)
                self.results.pull(list(left))  # recorded for a process that died
                return
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.TaskCancelledError:
                return
            except ray.exceptions.RayError as error:  # of the system: a node, a worker or its memory is gone
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                self.results.pull(list(left))
                for event in untold(store, {run_id: before[run_id] for run_id in left}):
                    hear(event)
        for spec in left.values():
            store.write(RunRecord(spec=spec, status="failed", reason=f"{self.attempts} attempts failed; {reason}"))

    def stop(self) -> None:
        """Cancel what runs."""
        with self._lock:
            for reference in self._running:
                ray.cancel(reference, force=True)

    def _run_once(self, track: Track, on_event: Callable[[Event], None]) -> None:
        threads = track.num_threads or max(1, int(self.resources.num_cpus))
        sent = track.model_copy(update={"num_threads": threads, "out": Path(track.out).resolve()})
        task = self._task(_run, self._memory(track), max_calls=1, num_returns="streaming")
        events = task.remote(sent.model_dump_json(), self.results.url)
        with self._lock:
            self._running.add(events)
        try:
            for event in events:
                on_event(Event.model_validate_json(ray.get(event)))
        finally:
            with self._lock:
                self._running.discard(events)

    def _memory(self, track: Track) -> int | None:
        """Bytes that a track reserves.

        Raises:
            UserError: no node has them.
        """
        memory = self.resources.memory or self.memory_of(track)
        if memory is not None:
            _slots(replace(self.resources, memory=memory))
        return memory

    def _task(self, function: Callable[..., Any], memory: int | None = None, **options: Any) -> Any:
        """Tried once by Ray: what to try again, and with which runs, is decided here."""
        wanted = self.resources
        return ray.remote(num_cpus=wanted.num_cpus, num_gpus=wanted.num_gpus, memory=memory, max_retries=0, **options)(
            function
        )


def _knock(address: str | None) -> None:
    """Fail at once where nobody listens; Ray itself tries for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _slots(resources: Resources) -> int:
    """Tracks that the cluster can run at once.

    Raises:
        UserError: no node can run one.
    """
    wanted = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, "memory": resources.memory or 0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(
        int(min((node.get(name, 0.0) / amount for name, amount in wanted.items() if amount), default=1))
        for node in nodes
    )
    if slots == 0:
        asked = ", ".join(
            f"{amount:g} {name}" if name != "memory" else f"{amount / 2**30:.1f} GiB of memory"
            for name, amount in wanted.items()
            if amount
        )
        raise UserError(f"no node of the Ray cluster has {asked} for a track; ask for less or add a node")
    return slots


def _cost(request: str) -> str:
    return LocalExecutor().cost(CostRequest.model_validate_json(request)).model_dump_json()


def _run(track: str, url: str | None) -> Iterator[str]:
    """The track in a process of its own, as on one machine; its events as they come."""
    given = Track.model_validate_json(track)
    if url is None:
        yield from _events(given, lambda _event: None)
        return
    with tempfile.TemporaryDirectory(prefix="harness-results-") as folder:
        results = results_at(url, Path(folder))

        def push(event: Event) -> None:
            if event.kind == "finished":
                results.push([event.run_id])

        yield from _events(given.model_copy(update={"out": Path(folder)}), push)
        results.push([spec.run_id for spec in given.specs])  # those recorded for a process that died


def _events(track: Track, hear: Callable[[Event], None]) -> Iterator[str]:
    """What `LocalExecutor.run` tells, as a stream; told to ``hear`` first."""
    told: queue.Queue[str | BaseException | None] = queue.Queue()

    def pass_on(event: Event) -> None:
        hear(event)
        told.put(event.model_dump_json())

    def work() -> None:
        try:
            LocalExecutor().run(track, pass_on)
            told.put(None)
        except BaseException as error:  # passed on to whoever reads the stream
            told.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (item := told.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item

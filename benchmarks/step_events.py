"""Discrete events of a training step: the times at which host, device, links and network of every rank do their work.

    program of each rank (items in the order in which its host issues them) ─ simulate ─► time and idle time by cause

The host of a rank issues kernels ahead of the device, up to a `HostWait`. Kernels run in the order of issue, one after
the other. A transfer runs on a lane of its own ("nvlink", "network") behind earlier transfers of that lane; it starts
when the kernels issued before it have ended, and the device waits for its result where the program says `Wait`.
Messages between pipeline ranks are a `Send` on one rank and a `Receive` of the same key on the other.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Run(NamedTuple):
    """Kernels, one behind the other."""

    kernels: int
    """The number of launches."""
    products: float
    """Seconds of the kernels that the matrix units bound."""
    memory: float
    """Seconds of the kernels that memory bounds."""
    lag: float = 0.0
    """Seconds from the host's first launch to the end of the last kernel, on a device that has nothing else to do."""


class Start(NamedTuple):
    """The begin of a transfer."""

    key: tuple[Hashable, ...]
    """The name by which `Wait` finds it."""
    lane: str
    """The lane it runs on."""
    seconds: float
    """Its duration."""


class Wait(NamedTuple):
    """The device waits for a transfer of this rank."""

    key: tuple[Hashable, ...]


class HostWait(NamedTuple):
    """The host waits until the device has done all that was issued, and for `seconds` more."""

    seconds: float


class Send(NamedTuple):
    """A message to another rank."""

    key: Hashable
    seconds: float
    blocking: bool
    """True if the device waits until it has been sent."""


class Receive(NamedTuple):
    """The device waits for a message."""

    key: Hashable


Item: TypeAlias = Run | Start | Wait | HostWait | Send | Receive


@dataclass
class Rank:
    """The clocks of a rank, and where its device's time went."""

    launch: float
    """Seconds of the host per launch."""
    steal: float
    """The share of the device that a transfer takes from kernels that run beside it."""
    host: float = 0.0
    device: float = 0.0
    lanes: dict[str, float] = field(default_factory=dict)
    """The time at which each lane is free."""
    started: dict[Hashable, tuple[str, float, float]] = field(default_factory=dict)
    """Lane, begin and end of the transfers that nobody has waited for yet."""
    spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds of the device: `products`, `memory`, and idle ones by cause. They add up to `device`."""

    def run(self, item: Run) -> None:
        """Run kernels. The device is idle where the host is late."""
        busy = item.products + item.memory
        end = max(self.device + busy, self.host + item.lag)
        self.spent["host"] += end - self.device - busy
        self.spent["products"] += item.products
        self.spent["memory"] += item.memory
        self.host, self.device = self.host + item.kernels * self.launch, end

    def start(self, item: Start) -> None:
        """Start a transfer behind the kernels and the transfers of its lane."""
        begin = max(self.device, self.host, self.lanes.get(item.lane, 0.0))
        self.lanes[item.lane] = begin + item.seconds
        self.started[item.key] = item.lane, begin, begin + item.seconds
        self.host += self.launch

    def wait(self, item: Wait) -> None:
        """Let the device wait for a transfer, and charge it what the transfer took from kernels beside it."""
        lane, begin, end = self.started.pop(item.key)
        stolen = self.steal * max(0.0, min(self.device, end) - begin)
        self.idle_until(max(self.device + stolen, end), lane)

    def idle_until(self, time: float, cause: str) -> None:
        """Let the device do nothing until `time`, because of `cause`."""
        if time > self.device:
            self.spent[cause] += time - self.device
            self.device = time

    def host_wait(self, item: HostWait) -> None:
        """Let the host wait for the device. What the device loses shows in the next kernels."""
        self.host = max(self.host, self.device) + item.seconds


@dataclass(frozen=True)
class Played:
    """The result of a simulation."""

    seconds: float
    """The duration of the step: the time at which the last rank is done."""
    spent: list[defaultdict[str, float]]
    """Seconds of each rank's device by what it did or waited for. They add up to `seconds`."""


def simulate(programs: Sequence[Iterable[Item]], launch: float, steal: float) -> Played:
    """Run the programs, one a rank, until all are done.

    A rank runs until it has to receive a message that has not been sent. Raises `RuntimeError` if all ranks wait.
    """
    ranks = [Rank(launch, steal) for _ in programs]
    left = [deque(program) for program in programs]
    sent: dict[Hashable, float] = {}
    waiting: dict[Hashable, int] = {}
    ready = deque(range(len(ranks)))
    while ready:
        number = ready.popleft()
        rank, items = ranks[number], left[number]
        while items:
            item = items[0]
            if isinstance(item, Receive) and item.key not in sent:
                waiting[item.key] = number
                break
            items.popleft()
            if isinstance(item, Send):
                _send(rank, item, sent)
                if item.key in waiting:
                    ready.append(waiting.pop(item.key))
            else:
                _do(rank, item, sent)
    if any(left):
        stuck = {number: items[0] for number, items in enumerate(left) if items}
        raise RuntimeError(f"the ranks wait for each other: {stuck}")
    end = max(rank.device for rank in ranks)
    for rank in ranks:
        rank.idle_until(end, "pipeline")
    return Played(end, [rank.spent for rank in ranks])


def _do(rank: Rank, item: Item, sent: dict[Hashable, float]) -> None:
    match item:
        case Run():
            rank.run(item)
        case Start():
            rank.start(item)
        case Wait():
            rank.wait(item)
        case HostWait():
            rank.host_wait(item)
        case Receive():
            rank.idle_until(sent.pop(item.key), "pipeline")
        case Send():
            raise AssertionError("a message is sent by _send")


def _send(rank: Rank, item: Send, sent: dict[Hashable, float]) -> None:
    # Messages have the network for themselves: their rare and short use of it delays no other transfer.
    begin = max(rank.device, rank.lanes.get("messages", 0.0))
    sent[item.key] = rank.lanes["messages"] = begin + item.seconds
    if item.blocking:
        rank.idle_until(sent[item.key], "pipeline")


def run_of(kernels: Sequence[tuple[float, bool]], launch: float) -> Run:
    """Return the kernels (seconds, whether the matrix units bound it) as one item."""
    products = sum(seconds for seconds, is_product in kernels if is_product)
    memory = sum(seconds for seconds, is_product in kernels if not is_product)
    lag, after = 0.0, 0.0
    # The last kernel ends after the launch of kernel i and all kernels from i on, whichever i that is latest for.
    for number, (seconds, _) in reversed(list(enumerate(kernels, 1))):
        after += seconds
        lag = max(lag, number * launch + after)
    return Run(len(kernels), products, memory, lag)

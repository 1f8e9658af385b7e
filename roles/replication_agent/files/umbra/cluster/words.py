"""What a person's word does in a group with a witness: each waits until the key tells.

What the coordinator has not written down in time is withdrawn: nobody is to find it done later.
NotNow, with one sentence for people, if it was not done; OSError if the disk refused.
"""

from __future__ import annotations

from typing import Any

from umbra.cluster import protocol as p
from umbra.cluster.driver import Driver
from umbra.cluster.machine import NotNow
from umbra.cluster.quorum import QuorumGroup


async def pause(driver: Driver, on: bool) -> bool:
    """Turn automatic changes off or on; False if it was so."""

    def done() -> bool:
        # What was asked for before and has no answer may be committed later.
        return driver.state.known is not None and all(
            record.paused is on for record in p.possible(driver.state)
        )

    if done():
        return False
    await _take(driver, p.Pause(on))
    await driver.until(lambda: done() or driver.state.pause is None, 2 * p.WRITE_DOWN)
    if not done():
        raise _withdrawn(driver)
    return True


async def switch(driver: Driver, to: str, *, automatic: bool = False) -> None:
    """Take no new work, for a planned change."""
    await _take(driver, p.Switch(to, automatic))


async def give_up(driver: Driver, to: str) -> None:
    """Give the key to ``to``: nothing is in flight any more. NotNow if it is still here."""
    state = driver.state
    if state.switching != to:
        seconds = driver.config.timing.silence
        raise NotNow(f"the drain took over {seconds:g} s and was given up")
    epoch = state.durable.epoch
    await driver.take(p.Drained())

    def decided() -> bool:
        state = driver.state
        return not p.holds(state) or (state.switching is None and not state.pending)

    known = await driver.until(decided, p.WRITE_DOWN)
    if known and not p.holds(driver.state) and driver.state.durable.epoch > epoch:
        return
    raise NotNow(
        f"{state.node} keeps the role: the coordinator has not written the change down"
        if known
        else f"it is not known whether {to} has the key now, since the coordinator does not"
        " answer; the one that has it opens by itself"
    )


async def force(group: QuorumGroup) -> None:
    """Become primary; returns when this node serves."""
    driver = group.driver
    known = driver.state.known
    await _take(driver, p.Force(group.stores()))

    def decided() -> bool:
        return group.is_primary() or not (driver.state.forced or p.holds(driver.state))

    await driver.until(decided, p.WRITE_DOWN + p.LONGEST)
    state = driver.state
    if group.is_primary():
        return
    if p.holds(state):
        raise NotNow(
            f"the key is {state.node}'s, which opens as soon as it can:"
            f" {'; '.join(group.reasons())}"
        )
    if state.known != known:
        raise NotNow(f"another node has written the key meanwhile: {state.cause}")
    raise _withdrawn(driver)


async def make_key(group: QuorumGroup) -> None:
    """Make the key that the coordinator has lost, with this node first.

    Also one that runs on what it has known: it is closed until nobody can have a right under that
    any more. NotNow if there is a key.
    """
    driver = group.driver
    state, vacancy = driver.state, driver.state.vacancy
    if vacancy is None:
        raise NotNow(f"{state.node} is {state.phase}: {state.cause}")
    # A pause outlives this, and so does the count of changes.
    last = state.known or vacancy.restored
    epoch = max(state.durable.epoch, last.epoch if last else 0) + 1
    record = p.Record(
        state.node,
        state.durable.storage,
        epoch,
        p.Mode.ALONE,
        paused=last is not None and last.paused,
        automatic=last.automatic if last else (),
        forced=epoch,
    )
    await driver.write(vacancy, record)

    def done() -> bool:
        return group.epoch >= record.epoch and group.is_primary()

    if not await driver.until(done, p.WRITE_DOWN + p.LONGEST):
        raise NotNow(f"{state.node} is {driver.state.phase}: {_trouble(driver)}")


def loss(group: QuorumGroup) -> dict[str, Any]:
    """Return what a promotion of this node by a person may lose.

    ``messages``, ``changes`` and ``seconds`` as this node last heard them; None is not known.
    ``others``: how many seconds ago other shadows that answer had everything. ``renewed``: this
    node had everything, and has another store since.
    """
    state = group.driver.state
    known = state.known
    if known is None:
        return {"certain": False, "messages": None, "changes": None, "seconds": None}
    if p.entitled(state, known):
        return {"certain": True, "messages": 0, "changes": 0, "seconds": 0.0}
    said = group.statuses.get(known.holder, {})
    lag = said.get("lag", {}).get(state.node)
    ages = {name: status.get("entitled_s") for name, status in group.statuses.items()}
    return {
        "certain": False,
        "messages": said.get("alone_messages"),
        "changes": None if lag is None else int(lag[0]),
        "seconds": group.entitled_age(),
        "others": {
            name: float(age)
            for name, age in sorted(ages.items())
            if age is not None and name != known.holder and group.answers(name)
        },
        "renewed": any(
            name == state.node and storage != state.durable.storage
            for name, storage in known.protected
        ),
    }


async def _take(driver: Driver, event: p.Event) -> None:
    try:
        await driver.take(event)
    except p.NotNow as error:
        raise NotNow(str(error)) from None


def _trouble(driver: Driver) -> str:
    return driver.coordinator_error or "it answers"


def _withdrawn(driver: Driver) -> NotNow:
    return NotNow(
        f"the coordinator has not written it down within {p.WRITE_DOWN:g} s, so this is withdrawn:"
        f" {_trouble(driver)}"
    )

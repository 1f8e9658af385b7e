"""The ports of a node in a group with a witness: a lease that ends with its right to act.

The kernel closes them then, whatever becomes of this process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from umbra.cluster.driver import Driver
from umbra.node.client import NodeHelper
from umbra.node.helper import HelperError

log = logging.getLogger(__name__)


class Lease:
    """Holds the ports open for as long as the right to act runs, and no longer.

    Also in a drain: who is being answered has to hear it.

    :param serves: whether this node acts, and serves clients.
    :param closing: whether a switchover closes the ports, or has done so.
    """

    def __init__(
        self,
        driver: Driver,
        helper: NodeHelper,
        ports: Sequence[int],
        serves: Callable[[], bool],
        closing: Callable[[], bool],
    ) -> None:
        self._driver = driver
        self._helper = helper
        self._ports = ports
        self._serves = serves
        self._closing = closing
        self._due = asyncio.Event()
        self.error = ""

    def look(self) -> None:
        """See to the ports at once."""
        self._due.set()

    async def run(self) -> None:
        """Do that until cancelled."""
        was_open = False
        while True:
            self._due.clear()
            try:
                is_open = self._serves()
                if is_open and not self._closing():
                    await self.renew()
                elif was_open and not is_open:
                    await self._helper.ports_close()
                was_open = is_open
                self.error = ""
            except HelperError as error:
                # A node that cannot open its ports does not serve: without a proof another will.
                if self._serves():
                    log.error("%s", error)
                    self.error = str(error)
            try:
                async with asyncio.timeout(self._driver.config.timing.beat):
                    await self._due.wait()
            except TimeoutError:
                pass

    async def renew(self) -> None:
        """Open the ports until the right ends, as it is known now. HelperError if that fails."""
        until = self._driver.right_until()
        if until <= self._driver.clock():
            return
        timing = self._driver.config.timing
        taken_over = until - timing.hold + timing.silence  # another node may act from then on
        await self._helper.ports_open_until(self._ports, until, taken_over)
        if not self._serves():
            await self._helper.ports_close()

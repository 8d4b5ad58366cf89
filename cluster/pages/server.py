"""A web server in a thread of a command: it listens when it is made, and stops when it is asked."""

from __future__ import annotations

import socket
import threading
import time

import uvicorn
from starlette.types import ASGIApp

from cluster.contracts.errors import AccordError, UserError
from cluster.pages.access import QUERY, Access

START_SECONDS = 30.0
STOP_SECONDS = 5.0
CONNECTIONS = 64  # more are answered 503: pages must not take a run's memory


class PageServer:
    """``app`` behind the checks of ``access``, at ``address``:``port`` (0: any free port).

    ``listening``: a socket of ``listen``, for who had to know the port before. ``connections``:
    more at once are refused; a browser opens several. Raises UserError where the port cannot be
    had.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        address: str,
        port: int,
        listening: socket.socket | None = None,
        connections: int = CONNECTIONS,
    ) -> None:
        self._access = access
        self._socket = listening or listen(address, port)
        self.address = address
        self.port: int = self._socket.getsockname()[1]
        self._server = uvicorn.Server(
            uvicorn.Config(
                access.guards(app),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,  # it would write the token down
                log_level="warning",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=connections,
                timeout_graceful_shutdown=1,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [self._socket]},
            name="accord-pages",
            daemon=True,
        )
        self._thread.start()
        self._await_start()

    @property
    def url(self) -> str:
        """Where the pages are, without the token."""
        shown = "127.0.0.1" if self.address in ("0.0.0.0", "::") else self.address
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}/"

    @property
    def url_with_token(self) -> str:
        return f"{self.url}?{QUERY}={self._access.token}"

    def stop(self) -> None:
        """Ends the thread; open answers have a second to end."""
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)
        self._socket.close()

    def _await_start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.stop()
                raise AccordError(f"the server of the pages did not start at {self.url}")
            time.sleep(0.01)


def listen(address: str, port: int) -> socket.socket:
    """A socket that takes connections; they wait until a ``PageServer`` has it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((address, port))
        found.listen(CONNECTIONS)
    except (OSError, OverflowError) as problem:
        found.close()
        reason = getattr(problem, "strerror", None) or str(problem)
        raise UserError(
            f"cannot listen: {reason}",
            where=f"{address} port {port}",
            fix="choose another port, or 0 for any free one",
        ) from None
    return found

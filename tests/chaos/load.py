"""Runs clients that create users at a set rate, and records their answers."""

import asyncio
import random
import time
from itertools import count

from tests.chaos.evidence import SignUp
from tests.chaos.http import NoAnswerError, post

INTENTS = {"new": 88, "impatient": 3, "taken username": 3, "taken email": 2, "invalid": 4}
"""What clients intend, in percent."""

_PATIENCE = 10.0
_IMPATIENCE = 0.03
"""Seconds that a client waits for an answer; an impatient one disconnects at about the commit."""
_TRIES = 4
_WITH_KEY = 0.5
"""Share of clients that send an Idempotency-Key."""

_INVALID = (
    {"password": "short"},
    {"full_name": "R2 D2"},
    {"email": "nobody at example.com"},
    {"username": "No Spaces Please"},
    {"password": None},
    {"role": "admin"},
    {"full_name": "x" * 70_000},
)


class Load:
    """All clients of one run."""

    def __init__(self, ports: list[int], rate: float, draw: random.Random) -> None:
        """Does not start yet.

        Args:
            ports: ports of the services.
            rate: new clients per second.
            draw: source of all randomness.
        """
        self.sign_ups: list[SignUp] = []
        self.acknowledged: list[SignUp] = []
        self._rate = rate
        self._draw = draw
        self._names = count(1)
        self._ports = ports
        self._clients: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        """Starts clients until `stop` is set, and waits for the last of them."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not stop.is_set():
            due += self._draw.expovariate(self._rate)
            if (wait := due - loop.time()) > 0:
                await asyncio.sleep(wait)
            client = asyncio.create_task(self._run_client(random.Random(self._draw.random())))
            self._clients.add(client)
            client.add_done_callback(self._clients.discard)
        while self._clients:
            await asyncio.wait(self._clients)

    async def close(self) -> None:
        """Cancels all clients."""
        for client in self._clients:
            client.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    async def _run_client(self, draw: random.Random) -> None:
        intent = draw.choices(list(INTENTS), list(INTENTS.values()))[0]
        name = f"user_{next(self._names)}"
        user: dict[str, object] = {
            "username": name,
            "password": "correct horse",
            "full_name": "A Chaotic User",
            "email": f"{name}@example.com",
        }
        if intent.startswith("taken"):
            if not self.acknowledged:
                return
            other = draw.choice(self.acknowledged)
            user |= {"username": other.username} if intent == "taken username" else {"email": other.email.title()}
        if intent == "invalid":
            user |= draw.choice(_INVALID)
        # A client that does not know the outcome may try again, and with a key it does so until it knows. Some ask once
        # more although they know.
        key = f"{draw.getrandbits(128):032x}" if draw.random() < _WITH_KEY else ""
        tries = range(_TRIES if draw.random() < 0.7 else 1)
        asks_once_more = bool(key) and draw.random() < 0.2
        for number in count() if key else tries:
            service = draw.randrange(len(self._ports))
            how = intent if number == 0 or intent != "impatient" else "new"
            if await self._post(service, user, how, key):
                if not asks_once_more:
                    return
                asks_once_more = False
            await asyncio.sleep(draw.uniform(0.5, 2.0))

    async def _post(self, service: int, user: dict[str, object], intent: str, key: str) -> bool:
        """Sends a request, and returns whether the client knows what became of it."""
        sign_up = SignUp(intent, str(user["username"]), str(user["email"]), service, time.time(), key=key)
        self.sign_ups.append(sign_up)
        patience = _IMPATIENCE if intent == "impatient" else _PATIENCE
        try:
            answer = await post(self._ports[service], "/v1/users", user, patience, key)
        except NoAnswerError as error:
            sign_up.body = str(error)
        else:
            sign_up.status, sign_up.body = answer.status, answer.body
            sign_up.is_replayed = answer.headers.get("idempotency-replayed") == "true"
            sign_up.must_retry = "retry-after" in answer.headers
        sign_up.answered = time.time()
        if sign_up.status == 201:
            self.acknowledged.append(sign_up)
        return sign_up.is_final

"""redis-py's asyncio client with hot reads from memory: redis.py once more, in the other colour."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import redis.asyncio
import redis.asyncio.client
from redis.exceptions import ResponseError

from thermocline.near.coherence import Background, Fetch, Flights, Steps, Wait
from thermocline.near.commands import Args, Kind, effect
from thermocline.near.held import Reply
from thermocline.near.options import Options
from thermocline.near.redis import Kept
from thermocline.near.tracking import Near


class AsyncPipeline(redis.asyncio.client.Pipeline):
    """redis-py's pipeline. Nothing in it is served from memory; what it changes is forgotten."""

    near: Near

    async def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002  # redis-py's signature
        """As in redis-py."""
        commands = [args for args, _ in self.command_stack]
        view = self.near.view
        steps = view.write([(effect(args), args) for args in commands])
        replies = await drive(steps, self, super().execute, raise_on_error)
        view.saw(commands, replies)
        return replies  # type: ignore[no-any-return]  # redis-py's own

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py: what is sent at once while keys are watched."""
        done = super().immediate_execute_command
        return await drive(self.near.view.write([(effect(args), args)]), self, done, *args, **options)


class AsyncRedis(Kept, redis.asyncio.Redis):  # type: ignore[misc]  # redis-py's own bases disagree
    """redis-py's `redis.asyncio.Redis`, and `near=Options(...)`: how values are kept. `client.near.stats()` counts."""

    def __init__(self, *args: Any, near: Options | None = None, **kwargs: Any) -> None:  # noqa: ANN401  # redis-py's
        super().__init__(*args, near=near, **kwargs)
        self._near_flights: Flights = {}  # of this client's loop
        self._near_tasks: set[asyncio.Task[Any]] = set()

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001  # redis-py's signature
        """As in redis-py."""
        for task in self._near_tasks:
            task.cancel()
        await super().aclose(close_connection_pool)
        self.near.leave(self)

    async def get(self, name: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py; from memory, where it is held."""
        found = super().get(name)
        return found if isinstance(found, bytes | str) else await found

    async def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py; hot reads from memory."""
        kind, plain = self.near_kind(args, options), super().execute_command
        if kind is Kind.NOTHING:
            return await plain(*args, **options)  # type: ignore[no-untyped-call]  # redis-py has half of its types
        return await drive(self.near_steps(kind, args, self._near_flights), self, plain, *args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> AsyncPipeline:  # noqa: ANN401, FBT001, FBT002  # redis-py's signature
        """As in redis-py."""
        pipeline = AsyncPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.near = self.near
        return pipeline

    async def near_read(self, commands: Sequence[Args]) -> list[Reply]:
        """See `Redis.near_read`."""
        return await drive(self.near_together(commands, self._near_flights), self, None)  # type: ignore[no-any-return]  # whatever the commands answer

    async def near_fetch(self, commands: tuple[Args, ...]) -> list[Reply]:
        """Several commands in one round trip; errors are among the replies."""
        if self.connection is not None or self.single_connection_client:  # a pipeline would take another connection
            return [await self._near_tried(command) for command in commands]
        plain = redis.asyncio.client.Pipeline
        async with plain(self.connection_pool, self.response_callbacks, False, None) as batch:  # noqa: FBT003  # redis-py's constructor
            for command in commands:
                batch.execute_command(*command)
            return await batch.execute(raise_on_error=False)

    def near_begun(self, steps: Steps) -> bool:
        """Take steps in a task of their own, where there is a connection for it; whether that was begun."""
        if self.connection is not None or self.single_connection_client:
            return False
        task = asyncio.get_running_loop().create_task(drive(steps, self, None))
        self._near_tasks.add(task)
        task.add_done_callback(self._near_tasks.discard)
        return True

    async def _near_tried(self, command: Args) -> Reply:
        try:
            return await super().execute_command(*command)  # type: ignore[no-untyped-call]  # as above
        except ResponseError as error:
            return error


async def drive(steps: Steps, client: Any, plain: Any, /, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # any client
    """Take the steps of one command."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Fetch):
                    reply = await client.near_fetch(step.commands)
                elif isinstance(step, Wait):
                    reply = await landed(step.future, step.seconds)
                elif isinstance(step, Background):
                    reply = client.near_begun(step.steps)
                else:
                    reply = await plain(*args, **options)
            except BaseException as error:  # noqa: BLE001  # the steps say what it means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        return end.value


async def landed(future: Future[Any], seconds: float) -> bool:
    """Wait for a future, whatever becomes of it; whether it is done. Cancelling us does not cancel the future."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    def wake(_: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(woken.set)

    future.add_done_callback(wake)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(woken.wait(), seconds)
    return future.done()

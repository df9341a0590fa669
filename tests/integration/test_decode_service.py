"""A real decode worker, front and engine, fed by the test over gRPC as a router and a prefill worker would."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from hma_serve.checkpoint import fingerprint
from hma_serve.core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    FailedPrecondition,
    HmaError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from hma_serve.kvblock import codec_for, codec_names
from hma_serve.rpc import from_rpc_error
from hma_serve.v1 import (
    common_pb2,
    decode_pb2,
    kv_transfer_pb2,
    worker_pb2,
)
from support.cluster import alive
from support.deadlines import deadline_in
from support.decode_worker import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    LEASE,
    MAX_RUNNING,
    NEW_TOKENS,
    VOCAB,
    WINDOW,
    Client,
    Worker,
    by_transformers,
    connected,
    emitted,
    first,
    prompt,
    refusal,
    refused_push,
    rest,
    running_worker,
)
from support.reference import reference_generate


async def test_greedy_tokens_equal_those_of_transformers(client: Client, checkpoint: Path) -> None:
    # Without packed tokens decode computes the prompt itself, however long, in pieces of --step-tokens.
    lengths = [(1, 0), (33, 32), (65, 64), (100, 96), (WINDOW - NEW_TOKENS, 0), (300, 288)]
    prompts = [prompt(length, seed) for seed, (length, _) in enumerate(lengths)]
    requests = [client.request(tokens, packed) for tokens, (_, packed) in zip(prompts, lengths, strict=True)]
    together = await asyncio.gather(*map(client.generate, requests))
    assert [emitted(responses) for responses in together] == by_transformers(checkpoint, prompts)
    for responses, tokens in zip(together, prompts, strict=True):
        kinds = [response.WhichOneof("event") for response in responses]
        assert kinds[:2] == ["ticket", "started"]
        assert set(kinds[2:-1]) == {"tokens"}
        finished = responses[-1].finished
        assert finished.reason == common_pb2.FINISH_REASON_LENGTH
        assert finished.usage == common_pb2.Usage(prompt_tokens=len(tokens), completion_tokens=NEW_TOKENS)


PROFILES = ("tt_bfp8", "fp8_e4m3", "mxint8", "nvfp4", "int8")


async def test_quantised_prompts_of_several_codecs_equal_the_reference(client: Client, checkpoint: Path) -> None:
    """All in one batch, so that one step reads pages of five codecs."""
    tokens = prompt(140)
    together = await asyncio.gather(
        *(client.generate(client.request(tokens, 128, profile), profile) for profile in PROFILES)
    )
    for profile, responses in zip(PROFILES, together, strict=True):
        assert responses[0].ticket.present_tokens == 0
        assert emitted(responses) == reference_generate(checkpoint, profile, tokens, NEW_TOKENS), profile


async def test_materialised_prompts_equal_the_reference(checkpoint: Path) -> None:
    tokens = prompt(140)
    with running_worker(checkpoint, "--kv-mode", "materialise") as made:
        async with connected(made, checkpoint) as client:
            for profile in ("tt_bfp8", "mxint8"):
                responses = await client.generate(client.request(tokens, 128, profile), profile)
                assert emitted(responses) == reference_generate(checkpoint, profile, tokens, NEW_TOKENS), profile


async def test_a_prompt_whose_beginning_is_here_is_sent_from_its_end(client: Client, checkpoint: Path) -> None:
    short = prompt(100, 7)
    longer = short + prompt(60, 8)
    whole = by_transformers(checkpoint, [short, longer])
    first_time = await client.generate(client.request(short, 96, tenant="one"))
    again, more = await asyncio.gather(
        client.generate(client.request(short, 96, tenant="one")),
        client.generate(client.request(longer, 128, tenant="one")),
    )
    assert [r[0].ticket.present_tokens for r in (first_time, again, more)] == [0, 96, 96]
    assert [emitted(r) for r in (first_time, again, more)] == [whole[0], *whole]
    of_another = await client.generate(client.request(short, 96, tenant="another"))
    assert of_another[0].ticket.present_tokens == 0


async def test_requests_that_lost_computed_pages_go_on_where_they_were(checkpoint: Path) -> None:
    """More text than overcommitted memory holds: the real attention reads pages that were given up and had back."""
    prompts = [prompt(length, seed) for seed, length in enumerate((300, 290, 100, 70, 33))]
    packed = (288, 0, 96, 64, 0)
    arguments = ("--overcommit", "--max-model-len", "512", "--kv-capacity-tokens", "512")
    with running_worker(checkpoint, *arguments) as made:
        async with connected(made, checkpoint) as client:
            assert (await client.worker.Describe(worker_pb2.DescribeRequest())).worker.limits.overcommit
            requests = [client.request(*pair, max_tokens=180) for pair in zip(prompts, packed, strict=True)]
            alone = [emitted(await client.generate(request)) for request in requests]
            together = await asyncio.gather(*map(client.generate, requests))
            preemptions = await made.metric("preemptions_total")
    assert [emitted(responses) for responses in together] == alone
    assert preemptions > 0


async def test_a_migrated_request_goes_on_where_it_stopped(client: Client, checkpoint: Path) -> None:
    tokens = prompt(70)
    (whole,) = by_transformers(checkpoint, [tokens])
    request = client.request(tokens, 64)
    request.emitted_token_ids.extend(whole[:3])
    responses = await client.generate(request)
    assert emitted(responses) == whole[3:]
    assert responses[-1].finished.usage.completion_tokens == NEW_TOKENS


async def test_a_seed_gives_the_same_tokens_alone_and_in_company(client: Client) -> None:
    request = client.request(prompt(40), max_tokens=12)
    request.sampling.temperature, request.sampling.seed, request.sampling.top_p = 1.2, 99, 0.9
    alone = emitted(await client.generate(request))
    together = await asyncio.gather(
        *(client.generate(r) for r in (request, client.request(prompt(50)), request, client.request(prompt(3))))
    )
    assert emitted(together[0]) == emitted(together[2]) == alone


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {5: 3.0}},
        {"top_k": 5},
        {"min_p": 0.1},
        {"logprobs": 3},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_every_sampling_option_runs_in_the_real_engine(client: Client, options: dict[str, Any]) -> None:
    request = client.request(prompt(40), min_tokens=4)
    request.sampling.MergeFrom(common_pb2.SamplingParams(temperature=0.7, seed=3, **options))
    assert len(emitted(await client.generate(request))) == NEW_TOKENS


async def test_stop_tokens_end_the_stream_and_are_not_among_the_tokens(client: Client, checkpoint: Path) -> None:
    tokens = prompt(70)
    (whole,) = by_transformers(checkpoint, [tokens])
    place = next(place for place, token in enumerate(whole) if place and token not in whole[:place])
    responses = await client.generate(client.request(tokens, 64, stop_token_ids=[whole[place]]))
    assert emitted(responses) == whole[:place]
    assert responses[-1].finished.reason == common_pb2.FINISH_REASON_STOP
    assert responses[-1].finished.stop_token_id == whole[place]


async def test_logprobs_come_with_every_token(client: Client) -> None:
    request = client.request(prompt(10))
    request.sampling.logprobs = 2
    logprobs = [entry for response in await client.generate(request) for entry in response.tokens.logprobs]
    assert len(logprobs) == NEW_TOKENS
    for entry in logprobs:
        assert entry.chosen == entry.top[0]
        assert entry.top[0].logprob >= entry.top[1].logprob


async def test_a_cancelled_stream_gives_its_pages_back(client: Client) -> None:
    call = client.decode.Generate(client.request(prompt(20), max_tokens=900), timeout=60)
    assert (await first(call)).HasField("ticket")
    assert (await client.load(lambda load: load.running == 1)).kv_used_tokens >= 920
    call.cancel()
    idle = await client.idle()
    assert idle.kv_free_tokens == idle.kv_capacity_tokens > 0


async def test_cancelling_before_the_kv_refuses_its_stream(client: Client) -> None:
    request = client.request(prompt(70), 64)
    call = client.decode.Generate(request, timeout=60)
    ticket = (await first(call)).ticket
    assert (await client.load(lambda load: load.waiting == 1)).kv_used_tokens > 0
    call.cancel()
    await client.idle()
    error = await refused_push(client.push(request.prompt_token_ids[:64], ticket))
    assert isinstance(error, NotFound)


async def test_a_deadline_ends_the_stream(client: Client) -> None:
    request = client.request(prompt(20), max_tokens=1000)
    request.context.deadline.CopyFrom(deadline_in(0.3))
    with pytest.raises(grpc.RpcError) as ended:
        await client.generate(request)
    assert isinstance(from_rpc_error(ended.value), DeadlineExceeded)


async def test_a_lease_without_kv_runs_out_and_extend_renews_it(client: Client) -> None:
    call = client.decode.Generate(client.request(prompt(70), 64), timeout=60)
    ticket = (await first(call)).ticket
    extend = decode_pb2.ExtendRequest(nonce=ticket.nonce, epoch=1)
    began = asyncio.get_running_loop().time()
    await asyncio.sleep(LEASE / 2)
    assert (await client.decode.Extend(extend)).lease == ticket.lease
    assert isinstance(await refusal(call.read()), Unavailable)
    assert asyncio.get_running_loop().time() - began >= 1.5 * LEASE - 0.1
    assert isinstance(await refusal(client.decode.Extend(extend)), NotFound)


async def test_a_producer_may_be_silent_for_as_long_as_its_ticket_is_renewed(
    checkpoint: Path,
) -> None:
    """A prefill worker serves other requests in between; nobody but the router may give up on this one."""
    with running_worker(checkpoint, "--stall-timeout", "0.5") as worker:
        async with connected(worker, checkpoint) as client:
            tokens = prompt(70)
            call = client.decode.Generate(client.request(tokens, 64), timeout=60)
            ticket = (await first(call)).ticket

            async def silence() -> None:
                for _ in range(6):
                    await asyncio.sleep(LEASE / 4)
                    await client.decode.Extend(decode_pb2.ExtendRequest(nonce=ticket.nonce, epoch=1))

            responses = await client.push(tokens[:64], ticket, pause=silence)
            assert responses[-1].WhichOneof("event") == "committed"
            assert [emitted(await rest(call))] == by_transformers(checkpoint, [tokens])


async def test_release_is_idempotent(client: Client) -> None:
    call = client.decode.Generate(client.request(prompt(70), 64), timeout=60)
    ticket = (await first(call)).ticket
    release = decode_pb2.ReleaseRequest(nonce=ticket.nonce, epoch=1)
    await client.decode.Release(release)
    await client.decode.Release(release)
    assert isinstance(await refusal(call.read()), Unavailable)


@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        (lambda r: r.ClearField("prompt_token_ids"), InvalidArgument, "prompt_token_ids"),
        (lambda r: r.prompt_token_ids.append(VOCAB), InvalidArgument, "prompt_token_ids"),
        (lambda r: r.emitted_token_ids.extend([5] * NEW_TOKENS), InvalidArgument, "emitted_token_ids"),
        (lambda r: setattr(r, "packed_tokens", 40), InvalidArgument, "packed_tokens"),
        (lambda r: setattr(r, "packed_tokens", 96), InvalidArgument, "packed_tokens"),
        (lambda r: r.ClearField("offer"), InvalidArgument, "offer"),
        (lambda r: setattr(r.stop, "max_tokens", WINDOW), ContextLengthExceeded, "prompt_token_ids"),
        (lambda r: setattr(r.sampling, "top_p", 0.0), InvalidArgument, "top_p"),
        (lambda r: r.sampling.logit_bias.update({VOCAB: 1.0}), InvalidArgument, "sampling.logit_bias"),
        (lambda r: setattr(r.offer, "model_fingerprint", "0" * 64), FailedPrecondition, "model_fingerprint"),
        (lambda r: setattr(r.offer.rope, "theta", 1e6), FailedPrecondition, "rope.theta"),
        (lambda r: r.context.deadline.FromSeconds(1), DeadlineExceeded, "context.deadline"),
    ],
)
async def test_wrong_requests_are_refused_before_a_ticket(
    client: Client, change: Callable[[decode_pb2.DecodeGenerateRequest], None], kind: type[HmaError], field: str
) -> None:
    request = client.request(prompt(70), 64)
    change(request)
    error = await refusal(client.decode.Generate(request, timeout=20).read())
    assert type(error) is kind
    assert error.field.endswith(field)


async def test_full_is_refused_at_once_and_only_while_it_is_full(client: Client) -> None:
    calls = [client.decode.Generate(client.request(prompt(70), 64), timeout=60) for _ in range(MAX_RUNNING)]
    for call in calls:
        assert (await first(call)).HasField("ticket")
    error = await refusal(client.decode.Generate(client.request(prompt(5)), timeout=20).read())
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after is not None
    for call in calls:
        call.cancel()
    await client.idle()
    assert len(emitted(await client.generate(client.request(prompt(5))))) == NEW_TOKENS


def flipped(frames: list[bytes]) -> list[bytes]:
    damaged = bytearray(frames[3])
    damaged[-1] ^= 1
    return [*frames[:3], bytes(damaged), *frames[4:]]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (flipped, "checksum_mismatch"),
        (lambda frames: [*frames[:3], *frames[2:]], "wrong_sequence"),
        (lambda frames: [*frames[:3], *frames[4:]], "wrong_sequence"),
        (lambda frames: [*frames[:4], frames[-1]], "wrong_block_count"),
        (lambda frames: [frames[0], b"\xff" * 40], "malformed_frame"),
        (lambda frames: [*frames[:3], frames[3][:-5]], "malformed_frame"),
        (lambda frames: frames[1:], "failed_precondition"),
        (lambda frames: [frames[0], frames[0]], "failed_precondition"),
        (lambda frames: frames[:-1], "unavailable"),
    ],
)
async def test_broken_streams_are_refused_counted_and_leave_the_ticket_empty(
    client: Client, worker: Worker, checkpoint: Path, change: Callable[[list[bytes]], list[bytes]], rule: str
) -> None:
    tokens = prompt(70)
    call = client.decode.Generate(client.request(tokens, 64), timeout=60)
    ticket = (await first(call)).ticket
    await refused_push(client.push(tokens[:64], ticket, change=change))
    assert await worker.metric(f'pushes_refused_total{{rule="{rule}"}}') > 0
    # Nothing of it was read: the attempt goes on with a proper stream.
    pushed = await client.push(tokens[:64], ticket)
    assert pushed[-1].committed.blocks > 0
    assert emitted(await rest(call)) == by_transformers(checkpoint, [tokens])[0]


async def test_streams_for_another_attempt_ticket_or_model_are_refused(client: Client) -> None:
    tokens = prompt(70)
    call = client.decode.Generate(client.request(tokens, 64), timeout=60)
    ticket = (await first(call)).ticket
    stale = await refused_push(client.push(tokens[:64], ticket, epoch=2))
    assert (type(stale), stale.field) == (FailedPrecondition, "epoch")
    unknown = await refused_push(client.push(tokens[:64], decode_pb2.Ticket(nonce=bytes(16), epoch=1)))
    assert isinstance(unknown, NotFound)
    other = await refused_push(client.push(tokens[:64], ticket, model_fingerprint="0" * 64))
    assert (type(other), other.field) == (FailedPrecondition, "model_fingerprint")
    shorter = await refused_push(client.push(tokens[:32], ticket))
    assert (type(shorter), shorter.field) == (FailedPrecondition, "manifest.token_count")
    codecs = await refused_push(client.push(tokens[:64], ticket, "tt_bfp8"))
    assert (type(codecs), codecs.field) == (FailedPrecondition, "manifest.codecs")
    call.cancel()


async def test_a_ticket_is_good_for_one_stream_of_one_attempt_and_each_other_use_is_counted(
    client: Client, worker: Worker
) -> None:
    rules = ("unknown_ticket", "wrong_epoch", "ticket_taken", "wrong_ticket")
    names = {rule: f'pushes_refused_total{{rule="{rule}"}}' for rule in rules}
    before = {rule: await worker.metric(name) for rule, name in names.items()}
    tokens = prompt(70)
    calls = [client.decode.Generate(client.request(tokens, 64), timeout=60) for _ in range(2)]
    mine, foreign = [(await first(call)).ticket for call in calls]
    guessed = decode_pb2.Ticket(nonce=bytes(15) + b"\1", epoch=1)
    assert isinstance(await refused_push(client.push(tokens[:64], guessed)), NotFound)
    assert isinstance(await refused_push(client.push(tokens[:64], mine, epoch=2)), FailedPrecondition)

    # A stream that opens with one ticket and then sends the blocks of another.
    blocks = client.frames(tokens[:64], foreign.nonce, foreign.epoch, "f32")[1:]
    await refused_push(client.push(tokens[:64], mine, change=lambda frames: [frames[0], *blocks]))

    # A duplicate of a stream that runs, of one that was committed, and of one whose request is over.
    async def duplicate() -> None:
        assert isinstance(await refused_push(client.push(tokens[:64], mine)), FailedPrecondition)

    await client.push(tokens[:64], mine, pause=duplicate)
    await refused_push(client.push(tokens[:64], mine))
    await rest(calls[0])
    await client.load(lambda load: load.running == 0)
    await refused_push(client.push(tokens[:64], mine))
    after = {rule: await worker.metric(name) - before[rule] for rule, name in names.items()}
    assert after == {"unknown_ticket": 2, "wrong_epoch": 1, "ticket_taken": 2, "wrong_ticket": 1}
    calls[1].cancel()
    await client.idle()


async def test_a_reservation_that_nobody_renews_is_swept_and_counted(client: Client, worker: Worker) -> None:
    swept = await worker.metric("expired_tickets_total")
    call = client.decode.Generate(client.request(prompt(70), 64), timeout=60)
    await first(call)
    assert isinstance(await refusal(call.read()), Unavailable)
    await client.idle()
    assert await worker.metric("expired_tickets_total") == swept + 1


async def test_acks_count_what_is_in_pages_and_credit_never_falls(client: Client) -> None:
    tokens = prompt(300)
    call = client.decode.Generate(client.request(tokens, 288), timeout=60)
    ticket = (await first(call)).ticket
    responses = await client.push(tokens[:288], ticket)
    assert responses[0].accepted.transport == kv_transfer_pb2.TRANSPORT_GRPC
    acks = [response.ack for response in responses[1:-1]]
    credits_granted = [responses[0].accepted.credit_bytes, *(ack.credit_bytes for ack in acks)]
    assert credits_granted == sorted(credits_granted)
    assert [ack.blocks for ack in acks] == sorted({ack.blocks for ack in acks})
    committed = responses[-1].committed
    assert committed.payload_bytes == LAYERS * 2 * 288 * KV_HEADS * HEAD_DIM * 4
    assert committed.blocks >= acks[-1].blocks
    assert len(await rest(call)) > 0


async def test_the_worker_describes_itself(client: Client, worker: Worker, checkpoint: Path) -> None:
    described = (await client.worker.Describe(worker_pb2.DescribeRequest())).worker
    assert described.role == worker_pb2.WORKER_ROLE_DECODE
    assert described.address == worker.address
    assert described.model.fingerprint == fingerprint(checkpoint)
    assert described.limits.max_model_len == WINDOW
    assert described.limits.kv_capacity_tokens >= WINDOW
    assert not described.limits.overcommit
    assert [codec_for(spec).name for spec in described.codecs] == list(codec_names())
    async with httpx.AsyncClient() as http:
        assert (await http.get(f"http://{worker.http}/ready")).status_code == 200


async def test_sigterm_finishes_streams_and_leaves_with_status_0(checkpoint: Path) -> None:
    with running_worker(checkpoint) as leaving:
        async with connected(leaving, checkpoint) as client:
            call = client.decode.Generate(client.request(prompt(5), max_tokens=400), timeout=60)
            assert (await first(call)).HasField("ticket")
            leaving.process.send_signal(signal.SIGTERM)
            await client.load(lambda load: load.state == worker_pb2.WORKER_STATE_DRAINING)
            error = await refusal(client.decode.Generate(client.request(prompt(5)), timeout=20).read())
            assert isinstance(error, Unavailable)
            assert len(emitted(await rest(call))) == 400
        engine = leaving.engine_pid
        assert leaving.process.wait(20) == 0
        assert not alive(engine)


async def test_a_dead_engine_ends_streams_and_the_process(checkpoint: Path) -> None:
    with running_worker(checkpoint) as broken:
        async with connected(broken, checkpoint) as client:
            call = client.decode.Generate(client.request(prompt(70), 64), timeout=60)
            assert (await first(call)).HasField("ticket")
            os.kill(broken.engine_pid, signal.SIGKILL)
            assert isinstance(await refusal(call.read()), Unavailable)
        assert broken.process.wait(20) not in (0, None)


async def test_an_engine_that_stands_still_is_as_good_as_dead(checkpoint: Path) -> None:
    """Its front is well and goes on reporting, so nobody else could notice."""
    with running_worker(checkpoint, "--engine-timeout", "1") as broken:
        async with connected(broken, checkpoint) as client:
            # An idle one goes round as well.
            assert len(emitted(await client.generate(client.request(prompt(5))))) == NEW_TOKENS
            call = client.decode.Generate(client.request(prompt(70), 64), timeout=60)
            assert (await first(call)).HasField("ticket")
            engine = broken.engine_pid
            os.kill(engine, signal.SIGSTOP)
            assert isinstance(await refusal(call.read()), Unavailable)
        assert broken.process.wait(20) not in (0, None)
        assert not alive(engine)


def test_a_dead_front_takes_its_engine_along(checkpoint: Path) -> None:
    with running_worker(checkpoint) as broken:
        engine = broken.engine_pid
        broken.process.kill()
        broken.process.wait()
        for _ in range(100):
            if not alive(engine):
                break
            threading.Event().wait(0.05)
        assert not alive(engine)

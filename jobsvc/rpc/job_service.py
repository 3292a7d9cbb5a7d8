"""JobService: validate, convert, call, convert. Errors go up to the CallBoundary."""

# ruff: noqa: N802 - the proto names the methods

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from generated.jobsvc.v1 import job_pb2, job_service_pb2_grpc
from generated.jobsvc.v1 import job_service_pb2 as pb
from jobsvc.core.model import NewJob
from jobsvc.rpc import convert, validate
from jobsvc.rpc.interceptors import Caller, Context, caller
from jobsvc.rpc.paging import Pages, beside, fill, page_size
from jobsvc.rpc.resume import ResumeTokens
from jobsvc.rpc.signing import Signer
from jobsvc.services.assembly import Services
from jobsvc.services.fleet import Beat, Told
from jobsvc.services.jobs import Registry, Submitted

# A request of this size may take some milliseconds to check, if all of it is small values; others
# on the event loop are not to wait for it.
HEAVY_BYTES = 16 * 1024


class JobService(job_service_pb2_grpc.JobServiceServicer):
    def __init__(self, services: Services, pages: Pages) -> None:
        self._jobs = services.jobs
        self._hub = services.hub
        self._fleet = services.fleet
        self._lists = services.lists
        self._resume = ResumeTokens(Signer(services.identity.secret))
        self._operations = services.operations
        self._pages = pages

    async def SubmitJob(
        self, request: pb.SubmitJobRequest, context: Context
    ) -> pb.SubmitJobResponse:
        by = caller()

        def prepare(registry: Registry) -> NewJob:
            validate.check(validate.submit_job(request, registry.types, time.time_ns()))
            return convert.new_job(request, by.actor, by.trace_id, by.span_id)

        if request.validate_only:
            return convert.submit_response(await self._jobs.preview(prepare))
        heavy = request.ByteSize() > HEAVY_BYTES
        return convert.submit_response(await self._jobs.submit(prepare, heavy=heavy))

    async def SubmitJobs(
        self, request: pb.SubmitJobsRequest, context: Context
    ) -> pb.SubmitJobsResponse:
        batch = _Batch(request, caller())
        # What only validates goes first: once it is refused, nothing may be stored.
        previews = await self._previews(batch)
        submitted: list[Submitted] = []
        if not previews or len(previews) < len(request.requests):
            submitted = await self._jobs.submit_many(batch.stored)
        answers = {True: iter(previews), False: iter(submitted)}
        in_order = [next(answers[each.validate_only]) for each in request.requests]
        return pb.SubmitJobsResponse(
            responses=await beside(
                len(in_order), lambda: [convert.submit_response(each) for each in in_order]
            )
        )

    async def _previews(self, batch: _Batch) -> list[Submitted]:
        if not batch.previewed_indexes:
            return []
        answers = await self._jobs.preview_many(batch.previewed)
        for index, answer in zip(batch.previewed_indexes, answers, strict=True):
            if not isinstance(answer, Submitted):
                raise type(answer)(answer.job_id, index)
        return [answer for answer in answers if isinstance(answer, Submitted)]

    async def RunJob(
        self, request: pb.RunJobRequest, context: Context
    ) -> AsyncGenerator[pb.RunJobResponse]:
        by = caller()

        def prepare(registry: Registry) -> NewJob:
            validate.check(validate.run_job(request, registry.types, time.time_ns()))
            return convert.new_job(request.request, by.actor, by.trace_id, by.span_id)

        heavy = request.ByteSize() > HEAVY_BYTES
        job_id = (await self._jobs.submit(prepare, heavy=heavy)).job_id
        watch = self._hub.watch(job_id, 0, convert.heartbeat_seconds(request))
        async with aclosing(watch):
            async for item in watch:
                yield convert.run_response(item)
        yield convert.run_response(await self._jobs.result(job_id, 0.0))

    async def GetJob(self, request: pb.GetJobRequest, context: Context) -> pb.GetJobResponse:
        validate.check(validate.get_job(request))
        return convert.get_response(await self._jobs.get(request.job_id))

    async def GetResult(
        self, request: pb.GetResultRequest, context: Context
    ) -> pb.GetResultResponse:
        validate.check(validate.get_result(request))
        outcome = await self._jobs.result(request.job_id, convert.wait_seconds(request))
        return convert.result(outcome)

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: Context
    ) -> AsyncGenerator[pb.WatchJobResponse]:
        validate.check(validate.watch_job(request))
        watch = self._hub.watch(
            request.job_id, request.after_sequence, convert.heartbeat_seconds(request)
        )
        async with aclosing(watch):
            async for item in watch:
                yield convert.watch_response(item)

    async def WatchJobs(  # type: ignore[override]  # what goes to many is encoded once
        self, request: pb.WatchJobsRequest, context: Context
    ) -> AsyncGenerator[pb.WatchJobsResponse | bytes]:
        validate.check(validate.watch_jobs(request))
        watch = self._fleet.watch(
            convert.job_filter(request.filter),
            self._resume.mark(request.resume_token),
            convert.heartbeat_seconds(request),
            self._encode,
        )
        async with aclosing(watch):
            async for item in watch:
                if isinstance(item, Beat):
                    yield convert.fleet_beat(item.time, self._resume.token(item.mark))
                else:
                    yield item.wire

    def _encode(self, told: Told) -> None:
        """Once for all who watch."""
        if not told.wire:
            told.wire = convert.fleet_event(told.found.event, self._resume.token(told.mark))

    async def ListJobEvents(
        self, request: pb.ListJobEventsRequest, context: Context
    ) -> pb.ListJobEventsResponse:
        validate.check(validate.list_job_events(request))
        size = page_size(request.page_size)
        # One more than the page holds tells whether there are more.
        events = await self._jobs.list_events(request.job_id, request.after_sequence, size + 1)
        return await beside(len(events), convert.events_page, events, size)

    async def ListJobs(self, request: pb.ListJobsRequest, context: Context) -> pb.ListJobsResponse:
        validate.check(validate.list_jobs(request))
        full = request.view == job_pb2.JOB_VIEW_FULL
        page, last = await self._lists.jobs(
            convert.job_filter(request.filter),
            self._pages.after(request),
            page_size(request.page_size),
            full=full,
            gather=partial(convert.jobs_page, full=full),
        )
        if last:
            page.next_page_token = self._pages.token(request, last)
        return page

    async def CancelJob(
        self, request: pb.CancelJobRequest, context: Context
    ) -> pb.CancelJobResponse:
        validate.check(validate.cancel_job(request))
        job = await self._jobs.cancel(request.job_id, request.reason, caller().actor)
        return pb.CancelJobResponse(job=convert.job(job))

    async def RetryJob(self, request: pb.RetryJobRequest, context: Context) -> pb.RetryJobResponse:
        validate.check(validate.retry_job(request))
        job = await self._jobs.retry(request.job_id, caller().actor)
        return pb.RetryJobResponse(job=convert.job(job))

    async def UpdateJob(
        self, request: pb.UpdateJobRequest, context: Context
    ) -> pb.UpdateJobResponse:
        validate.check(validate.update_job(request, time.time_ns()))
        update = convert.job_update(request)
        job = await self._jobs.update(request.job_id, update, caller().actor)
        return pb.UpdateJobResponse(job=convert.job(job))

    async def DeleteJob(
        self, request: pb.DeleteJobRequest, context: Context
    ) -> pb.DeleteJobResponse:
        validate.check(validate.delete_job(request))
        await self._jobs.delete(request.job_id, caller().actor)
        return pb.DeleteJobResponse()

    async def ExplainJob(
        self, request: pb.ExplainJobRequest, context: Context
    ) -> pb.ExplainJobResponse:
        validate.check(validate.explain_job(request))
        return convert.explanation(await self._operations.explain(request.job_id))

    async def ListJobTypes(
        self, request: pb.ListJobTypesRequest, context: Context
    ) -> pb.ListJobTypesResponse:
        validate.check(validate.page(request))
        size = page_size(request.page_size)
        found = await self._operations.list_job_types(self._pages.after(request), size + 1)
        page = pb.ListJobTypesResponse()
        if await beside(len(found), fill, page.job_types, convert.job_types(found), size):
            page.next_page_token = self._pages.token(request, page.job_types[-1].name)
        return page


class _Batch:
    """The jobs of one SubmitJobs call, checked once for each registry that they meet."""

    def __init__(self, request: pb.SubmitJobsRequest, by: Caller) -> None:
        self._request = request
        self._by = by
        self._jobs: list[NewJob] = []
        self._revision: int | None = None
        self.previewed_indexes = [
            index for index, each in enumerate(request.requests) if each.validate_only
        ]

    def previewed(self, registry: Registry) -> list[NewJob]:
        jobs = self.jobs(registry)
        return [jobs[index] for index in self.previewed_indexes]

    def jobs(self, registry: Registry) -> list[NewJob]:
        if registry.revision != self._revision:
            validate.check(validate.submit_jobs(self._request, registry.types, time.time_ns()))
            self._jobs = [
                convert.new_job(each, self._by.actor, self._by.trace_id, self._by.span_id)
                for each in self._request.requests
            ]
            self._revision = registry.revision
        return self._jobs

    def stored(self, registry: Registry) -> list[NewJob]:
        pairs = zip(self.jobs(registry), self._request.requests, strict=True)
        return [job for job, each in pairs if not each.validate_only]

// Submits a job once, follows it over every broken connection, and prints how it ended.
//
//   npm ci
//   JOBSVC_PROTOS=../../../protos node main.js demo.sleep '{"seconds": 5, "steps": 5}' order-17

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const {
  JOBSVC_ADDRESS = "127.0.0.1:50051",
  JOBSVC_TOKEN,
  JOBSVC_TLS_CA, // a PEM file; turns TLS on
  JOBSVC_PROTOS = "protos",
  HEARTBEAT_SECONDS = "15",
} = process.env;
const HEARTBEAT = Number(HEARTBEAT_SECONDS);

const loaded = loadSync("jobsvc/v1/job_service.proto", {
  includeDirs: [JOBSVC_PROTOS],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { JobService } = grpc.loadPackageDefinition(loaded).jobsvc.v1;
const credentials = JOBSVC_TLS_CA
  ? grpc.credentials.createSsl(readFileSync(JOBSVC_TLS_CA))
  : grpc.credentials.createInsecure();
const client = new JobService(JOBSVC_ADDRESS, credentials, {
  "grpc.max_reconnect_backoff_ms": 10_000,
});
const metadata = new grpc.Metadata();
if (JOBSVC_TOKEN) metadata.set("authorization", `Bearer ${JOBSVC_TOKEN}`);

// The server went away, sent us away for reading too slowly, stopped, or did not answer in time;
// or we gave a silent stream up, which is CANCELLED too.
const TRANSIENT = ["UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED"];
const isTransient = (error) => TRANSIENT.includes(grpc.status[error.code]);

// Milliseconds to wait: random, up to a bound that doubles from 0.2 s to 10 s.
function* backoff() {
  for (let bound = 200; ; bound = Math.min(2 * bound, 10_000)) yield Math.random() * bound;
}

// Calls until there is an answer. SubmitJob too: its key makes that safe.
async function insist(method, request) {
  for (const wait of backoff()) {
    try {
      return await new Promise((resolve, reject) => {
        const done = (error, answer) => (error ? reject(error) : resolve(answer));
        client[method](request, metadata, { deadline: Date.now() + 10_000 }, done);
      });
    } catch (error) {
      if (!isTransient(error)) throw error;
      console.error(`${error.details}; trying again`);
    }
    await sleep(wait);
  }
}

// Every event once and in order, until the job has ended.
async function* watch(job_id) {
  let after = "0";
  let waits = backoff();
  while (true) {
    const heartbeat_interval = { seconds: HEARTBEAT };
    const call = client.WatchJob({ job_id, after_sequence: after, heartbeat_interval }, metadata);
    const giveUp = () => call.cancel();
    let silence = setTimeout(giveUp, 3000 * HEARTBEAT);
    try {
      for await (const { message, event } of call) {
        clearTimeout(silence);
        silence = setTimeout(giveUp, 3000 * HEARTBEAT);
        if (message !== "event") continue;
        after = event.sequence;
        waits = backoff();
        yield event;
      }
      return;
    } catch (error) {
      if (!isTransient(error)) throw error;
      console.error(`${error.details}; resuming after ${after}`);
    } finally {
      clearTimeout(silence);
      call.cancel();
    }
    await sleep(waits.next().value);
  }
}

// google.protobuf.Value from and to what JSON has.
function toValue(json) {
  if (json === null) return { nullValue: "NULL_VALUE" };
  if (Array.isArray(json)) return { listValue: { values: json.map(toValue) } };
  if (typeof json === "object") return { structValue: toStruct(json) };
  return { [`${typeof json === "boolean" ? "bool" : typeof json}Value`]: json };
}
function toStruct(object) {
  const fields = Object.entries(object).map(([key, value]) => [key, toValue(value)]);
  return { fields: Object.fromEntries(fields) };
}
function fromValue({ kind, ...value }) {
  if (kind === "nullValue") return null;
  if (kind === "listValue") return value.listValue.values.map(fromValue);
  if (kind !== "structValue") return value[kind];
  const fields = Object.entries(value.structValue.fields ?? {});
  return Object.fromEntries(fields.map(([key, field]) => [key, fromValue(field)]));
}

async function main(job_type, payload, key) {
  // A key says what the job is for, so that whoever asks again gets the same job.
  const submit = { job_type, payload: toStruct(JSON.parse(payload)), idempotency_key: key };
  const { job } = await insist("SubmitJob", submit);
  console.log("job", job.job_id);
  for await (const event of watch(job.job_id)) {
    // A type that this program does not know is a number.
    const type = String(event.type).replace("JOB_EVENT_TYPE_", "");
    console.log(event.sequence, type, String(event.state).replace("JOB_STATE_", ""));
  }
  const answer = await insist("GetResult", { job_id: job.job_id });
  const outcome = answer[answer.outcome];
  const json = answer.outcome === "result" ? fromValue(outcome) : outcome;
  console.log(answer.outcome, JSON.stringify(json));
  process.exitCode = answer.state === "JOB_STATE_SUCCEEDED" ? 0 : 1;
}

if (process.argv.length !== 5) {
  console.error("usage: node main.js JOB_TYPE PAYLOAD KEY");
  process.exit(2);
}
try {
  await main(...process.argv.slice(2));
} catch (error) {
  if (error.code === undefined) throw error;
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
} finally {
  client.close();
}

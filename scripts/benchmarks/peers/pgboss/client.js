// A client, as ../../orders.py has it: the same orders, the same answers.
import readline from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';

import { connect, QUEUE } from './boss.js';

const WARM_UP_SECONDS = 0.5;
const PAUSE_MS = 10;
const POLL_MS = 5;

const order = JSON.parse(process.argv[2]);
const payload = JSON.parse(process.argv[3]);
const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const boss = await connect();

const monotonic = () => Number(process.hrtime.bigint()) / 1e9;
const cpuSeconds = () => {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1e6;
};

async function go(warmedUp = 0) {
  console.log('up');
  await lines.next();
  return {
    warmed_up: warmedUp, count: 0, began: monotonic(), ended: 0, cpu_seconds: -cpuSeconds(),
    to_start: [], to_done: [], due: {},
  };
}

function tell(done) {
  done.ended = monotonic();
  done.cpu_seconds += cpuSeconds();
  console.log(JSON.stringify(done));
}

const submit = () => boss.send(QUEUE, payload);
const submitBulk = (count) => boss.insert(Array(count).fill({ name: QUEUE, data: payload }));
const inFlight = (repeat) => Promise.all(Array.from({ length: order.in_flight }, repeat));

async function submitFor() {
  const call = order.bulk === 1 ? submit : () => submitBulk(order.bulk);
  const allFor = async (seconds) => {
    const until = monotonic() + seconds;
    const times = [];
    await inFlight(async () => {
      for (let began; (began = monotonic()) < until;) {
        await call();
        times.push(monotonic() - began);
      }
    });
    return times;
  };
  const done = await go((await allFor(WARM_UP_SECONDS)).length * order.bulk);
  done.to_done = await allFor(order.seconds);
  done.count = done.to_done.length * order.bulk;
  tell(done);
}

async function fill() {
  const done = await go();
  let left = order.count;
  await inFlight(async () => {
    while (left > 0) {
      const count = Math.min(left, order.bulk);
      left -= count;
      await submitBulk(count);
    }
  });
  done.count = order.count;
  tell(done);
}

// A job that is late does not delay the next: each is timed from the moment it was due.
async function keepRate() {
  await submit();
  const done = await go(1);
  const epoch = Date.now() / 1000;
  const submits = [];
  const count = Math.max(1, Math.floor(order.rate * order.seconds));
  for (let number = 0; number < count; number++) {
    const due = number / order.rate;
    const left = done.began + due - monotonic();
    if (left > 0) await sleep(left * 1000);
    submits.push(submit().then((id) => { done.due[id] = epoch + due; }));
  }
  await Promise.all(submits);
  done.count = submits.length;
  tell(done);
}

async function follow(done) {
  const began = monotonic();
  const id = await submit();
  while ((await boss.getJobById(QUEUE, id)).state !== 'completed') await sleep(POLL_MS);
  done.to_done.push(monotonic() - began);
}

async function oneAfterTheOther() {
  for (let number = 0; number < Math.min(3, order.count); number++) await follow({ to_done: [] });
  const done = await go();
  const until = monotonic() + order.seconds;
  while (done.count < order.count && monotonic() < until) {
    await follow(done);
    done.count += 1;
    await sleep(PAUSE_MS);
  }
  tell(done);
}

const kinds = { submit: submitFor, fill, rate: keepRate, latency: oneAfterTheOther };
await kinds[order.kind]();
await lines.next(); // connected until its input is closed
process.exit();

// A worker, until it is killed.
import { connect, QUEUE } from './boss.js';

// What the fastest runs have: the shortest interval that pg-boss takes, and many jobs a fetch.
const OPTIONS = { pollingIntervalSeconds: 0.5, batchSize: 2000 };

const boss = await connect();
// Of several jobs pg-boss keeps no result by itself: all of a batch get the first one's, which takes
// one statement, and is the fastest there is.
await boss.work(QUEUE, OPTIONS, async (jobs) => {
  await boss.complete(QUEUE, jobs.map((job) => job.id), jobs[0].data);
});
console.log('bench worker ready');

// pg-boss's application; its address comes in the environment.
import PgBoss from 'pg-boss';

export const QUEUE = 'bench';
const CONNECTIONS_MAX = 32;

export async function connect() {
  const boss = new PgBoss({
    connectionString: process.env.BENCH_DATABASE_URL,
    max: CONNECTIONS_MAX,
    schedule: false,
  });
  boss.on('error', (error) => {
    console.error(error);
    process.exit(1);
  });
  await boss.start();
  await boss.createQueue(QUEUE);
  return boss;
}

// Makes the schema and the queue, and ends.
import { connect } from './boss.js';

await connect();
process.exit();

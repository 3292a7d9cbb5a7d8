// Calls the service as told on stdin, one JSON document a line; answers on stdout alike.
//
//   {id, op: "call" | "stream", method, request, token, seconds} -> {id, message}…, {id, status}
//   {id, op: "stop"}            ends the stream of that id
//   {id, op: "services"}        -> {id, message: {services}}, {id, status}
//
// Messages are proto JSON with the field names of the .proto; `status` is a google.rpc.Status,
// decoded from the trailers where there is one.

'use strict';

const fs = require('node:fs');
const path = require('node:path');
const readline = require('node:readline');
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const protobuf = require('protobufjs');
require('protobufjs/ext/descriptor');

const [address, othersPath, ...includeDirs] = process.argv.slice(2);

const OPTIONS = { keepCase: true, longs: String, enums: String, includeDirs };
const FILES = ['job_service', 'schedule_service', 'admin_service'].map(
  (name) => `jobsvc/v1/${name}.proto`,
);
const ERRORS = ['google/rpc/status.proto', 'google/rpc/error_details.proto'];
// Health and reflection come as a descriptor set.
const OTHERS = fs.readFileSync(othersPath);

// The names and types of the fields, which proto-loader keeps to itself.
const ours = new protobuf.Root();
ours.resolvePath = (origin, target) =>
  includeDirs.map((directory) => path.join(directory, target)).find(fs.existsSync) ?? target;
ours.loadSync([...FILES, ...ERRORS], { keepCase: true });
const others = protobuf.Root.fromDescriptor(OTHERS);

const clients = new Map();
const calls = new Map();

function connect(definition) {
  const services = grpc.loadPackageDefinition(definition);
  for (const name of Object.keys(definition)) {
    const Service = name.split('.').reduce((node, part) => node[part], services);
    if (Service.service && !clients.has(name)) {
      clients.set(name, new Service(address, grpc.credentials.createInsecure()));
    }
  }
}

connect(loader.loadSync(FILES, OPTIONS));
connect(loader.loadFileDescriptorSetFromBuffer(OTHERS, OPTIONS));

// Proto JSON, which protobufjs has not.

function lookup(name) {
  const root = name.startsWith('jobsvc.') ? ours : others;
  return root.lookup(name);
}

function span({ seconds = '0', nanos = 0 }) {
  const sign = seconds.startsWith('-') || nanos < 0 ? '-' : '';
  const fraction = nanos ? `.${String(Math.abs(nanos)).padStart(9, '0')}` : '';
  return `${sign}${seconds.replace('-', '')}${fraction}s`;
}

function fromSpan(text) {
  const [, sign, seconds, fraction = ''] = /^(-?)(\d+)(?:\.(\d{1,9}))?s$/.exec(text);
  return { seconds: sign + seconds, nanos: Number(sign + fraction.padEnd(9, '0')) };
}

function moment({ seconds = '0', nanos = 0 }) {
  const text = new Date(Number(seconds) * 1000).toISOString();
  return text.replace('.000Z', nanos ? `.${String(nanos).padStart(9, '0')}Z` : 'Z');
}

function fromMoment(text) {
  const [, whole, fraction = ''] = /^(.*?)(?:\.(\d{1,9}))?Z$/.exec(text);
  return {
    seconds: String(Date.parse(`${whole}Z`) / 1000),
    nanos: Number(fraction.padEnd(9, '0')),
  };
}

function mapped(object, convert) {
  return Object.fromEntries(Object.entries(object).map(([key, value]) => [key, convert(value)]));
}

function value(message) {
  if ('structValue' in message) return mapped(message.structValue.fields ?? {}, value);
  if ('listValue' in message) return (message.listValue.values ?? []).map(value);
  if ('nullValue' in message) return null;
  return message.stringValue ?? message.numberValue ?? message.boolValue;
}

function fromValue(data) {
  if (data === null) return { nullValue: 'NULL_VALUE' };
  if (Array.isArray(data)) return { listValue: { values: data.map(fromValue) } };
  if (typeof data === 'object') return { structValue: { fields: mapped(data, fromValue) } };
  return { [`${typeof data === 'boolean' ? 'bool' : typeof data}Value`]: data };
}

const SPECIAL = {
  '.google.protobuf.Duration': [span, fromSpan],
  '.google.protobuf.Timestamp': [moment, fromMoment],
  '.google.protobuf.Value': [value, fromValue],
  '.google.protobuf.Struct': [
    (message) => mapped(message.fields ?? {}, value),
    (data) => ({ fields: mapped(data, fromValue) }),
  ],
  '.google.protobuf.FieldMask': [
    ({ paths = [] }) => paths.join(','),
    (text) => ({
      paths: text
        .split(',')
        .filter(Boolean)
        .map((name) => name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)),
    }),
  ],
};

// `direction`: 0 from the message to JSON, 1 from JSON to the message.
function convert(type, data, direction) {
  const special = SPECIAL[type.fullName];
  if (special) return special[direction](data);
  return Object.fromEntries(
    Object.entries(data).map(([name, content]) => {
      const field = type.fields[name];
      if (!field) throw new Error(`${type.fullName} has no field ${name}`);
      return [name, all(field, content, direction)];
    }),
  );
}

function all(field, content, direction) {
  field.resolve();
  const single = (each) => one(field, each, direction);
  if (field.map) return mapped(content, single);
  return field.repeated ? content.map(single) : single(content);
}

function one(field, content, direction) {
  if (field.resolvedType instanceof protobuf.Type) {
    return convert(field.resolvedType, content, direction);
  }
  if (field.type !== 'bytes') return content;
  return direction ? Buffer.from(content, 'base64') : content.toString('base64');
}

// Answers.

function say(id, answer) {
  process.stdout.write(`${JSON.stringify({ id, ...answer })}\n`);
}

function status(error) {
  const [trailer] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!trailer) return { code: error.code, message: error.details };
  const decoded = ours.lookupType('google.rpc.Status').decode(trailer);
  return {
    code: decoded.code,
    message: decoded.message,
    details: decoded.details.map((any) => {
      const url = any.type_url;
      const type = ours.lookupType(url.split('/').pop());
      const detail = type.toObject(type.decode(any.value), { longs: String, enums: String });
      return { '@type': url, ...convert(type, detail, 0) };
    }),
  };
}

function metadata(token) {
  const made = new grpc.Metadata();
  if (token) made.set('authorization', `Bearer ${token}`);
  return made;
}

function follow(id, call, read) {
  calls.set(id, call);
  call.on('data', (message) => say(id, { message: read(message) }));
  call.on('error', (error) => say(id, { status: status(error) }));
  // 'error' told of every other end.
  call.on('status', ({ code }) => code === grpc.status.OK && say(id, { status: { code } }));
  call.on('close', () => calls.delete(id));
}

function begin({ id, op, method, request, token, seconds }) {
  const [service, name] = method.split('/');
  const { requestType, responseType } = lookup(service).methods[name];
  const [send, receive] = [requestType, responseType].map((type) =>
    lookup(service).parent.lookupType(type),
  );
  const message = convert(send, request, 1);
  const options = { deadline: Date.now() + seconds * 1000 };
  const read = (answer) => convert(receive, answer, 0);
  const client = clients.get(service);
  if (op === 'stream') {
    follow(id, client[name](message, metadata(token), options), read);
    return;
  }
  client[name](message, metadata(token), options, (error, answer) => {
    if (!error) say(id, { message: read(answer) });
    say(id, { status: error ? status(error) : { code: grpc.status.OK } });
  });
}

function listServices(id) {
  const call = clients.get('grpc.reflection.v1alpha.ServerReflection').ServerReflectionInfo();
  follow(id, call, (answer) => ({
    services: answer.list_services_response.service.map(({ name }) => name),
  }));
  call.write({ list_services: '' });
  call.end();
}

readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const order = JSON.parse(line);
  if (order.op === 'stop') calls.get(order.id)?.cancel();
  else if (order.op === 'services') listServices(order.id);
  else begin(order);
});

// The far end of the wire in Node (18 or newer), by itself: `serve(World)` hosts instances of one world.
//
//     const { serve } = await import(`${process.env.SELFWRIGHT_FAR_ENDS}/far_end.mjs`);
//     serve(class { ... });
//
// A world is a class, made with its settings as one object; its methods may be plain or async: tasks(split),
// reset(task, seed), step(action), close(), and, if it can, expert, random, answer, named, snapshot and restore,
// without_oracle; what it says of itself stands in `static spec`. Observations and steps are objects as
// docs/wire.md has them (images: Buffers of PNG files). Seeds are BigInts: they take 63 bits.

import { writeSync } from "node:fs";

export const PROTOCOL = 1;
export const FRAME_MB = 256;
const ABILITIES = ["expert", "random", "answer", "named", "snapshot", "restore", "without_oracle"];
const BASIC = ["id", "instruction", "max_steps"];

class Unsendable extends Error {}

// Frames: u32 length of the rest, u32 length of the header, header (JSON), blobs one after another.

function pack(header, blobs = []) {
  const text = Buffer.from(JSON.stringify({ ...header, blobs: blobs.map((blob) => blob.length) }));
  const size = 4 + text.length + blobs.reduce((sum, blob) => sum + blob.length, 0);
  if (size > FRAME_MB * 2 ** 20) throw new Unsendable(`a frame of ${size} bytes; wanted at most ${FRAME_MB} MiB`);
  const head = Buffer.alloc(8);
  head.writeUInt32BE(size, 0);
  head.writeUInt32BE(text.length, 4);
  return Buffer.concat([head, text, ...blobs]);
}

function* frames(state, chunk) {
  state.held = state.held.length ? Buffer.concat([state.held, chunk]) : chunk;
  while (state.held.length >= 8) {
    const size = state.held.readUInt32BE(0);
    const length = state.held.readUInt32BE(4);
    if (4 + length > size || size > FRAME_MB * 2 ** 20) throw new Error(`no frame begins so: ${size}, ${length}`);
    if (state.held.length < 4 + size) return;
    yield parsed(state.held.toString("utf8", 8, 8 + length));
    state.held = state.held.subarray(4 + size);
  }
}

// A seed takes 63 bits, of which a number would keep 53.
function parsed(text) {
  const question = JSON.parse(text);
  if ("seed" in question) question.seed = BigInt(/"seed":(\d+)/.exec(text)?.[1] ?? question.seed);
  return question;
}

// What JSON would lose or change without a word is refused, with its place.
function plain(value, where) {
  if (value === null || typeof value === "boolean") return value;
  if (typeof value === "string") return text(value, where);
  if (typeof value === "number") {
    if (!Number.isFinite(value)) throw new Unsendable(`${where}: ${value}; wanted a finite number`);
    return value;
  }
  if (Array.isArray(value)) return value.map((one, k) => plain(one, `${where}[${k}]`));
  if (typeof value === "object" && [Object.prototype, null].includes(Object.getPrototypeOf(value))) {
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, plain(one, `${where}.${key}`)]));
  }
  throw new Unsendable(`${where}: ${value?.constructor?.name ?? typeof value}`);
}

function text(value, where) {
  if (typeof value !== "string") throw new Unsendable(`${where}: ${typeof value}; wanted a text`);
  if (!value.isWellFormed?.() && Buffer.from(value).toString() !== value) {
    throw new Unsendable(`${where}: half a surrogate pair is no Unicode`);
  }
  return value;
}

function flag(value, where) {
  if (typeof value !== "boolean") throw new Unsendable(`${where}: ${typeof value}; wanted a boolean`);
  return value;
}

function observation(value, where) {
  const told = typeof value === "string" ? { text: value } : value;
  if (typeof told !== "object" || told === null) throw new Unsendable(`${where}: ${typeof told}; wanted a text, or something with one`);
  const blobs = (told.images ?? []).map((image, k) => {
    if (!(image instanceof Uint8Array)) throw new Unsendable(`${where}.images[${k}]: ${typeof image}; wanted PNG bytes`);
    return Buffer.from(image.buffer, image.byteOffset, image.byteLength);
  });
  const actions = (told.actions ?? []).map((one, k) => text(one, `${where}.actions[${k}]`));
  return [{ text: text(told.text, `${where}.text`), images: blobs.length, actions, actor: text(told.actor ?? "", `${where}.actor`) }, blobs];
}

function timeStep(told) {
  if (typeof told !== "object" || told === null) throw new Unsendable(`step: ${typeof told}; wanted observation, reward, ...`);
  const [seen, blobs] = observation(told.observation, "step.observation");
  if (typeof told.reward !== "number") throw new Unsendable(`step.reward: ${typeof told.reward}; wanted a number`);
  const header = { observation: seen, reward: plain(told.reward, "step.reward") };
  for (const name of ["terminated", "truncated", "success"]) header[name] = flag(told[name] ?? false, `step.${name}`);
  header.answer = told.answer == null ? null : text(told.answer, "step.answer");
  return [header, blobs];
}

function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  return `{${Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
}

function taskTold(task, where) {
  const told = plain({ ...task }, where);
  text(told.id, `${where}.id`);
  text(told.instruction, `${where}.instruction`);
  if (!Number.isInteger(told.max_steps)) throw new Unsendable(`${where}.max_steps: ${told.max_steps}; wanted a whole number`);
  const rest = Object.fromEntries(Object.entries(told).filter(([key]) => !BASIC.includes(key)));
  return [...BASIC.map((name) => told[name]), canonical(rest), ""];
}

const taskMade = ([id, instruction, max_steps, rest]) => ({ ...JSON.parse(rest), id, instruction, max_steps });

class FarEnd {
  constructor(World) {
    this.World = World;
    this.instances = new Map();
    this.played = new Map();
    this.splits = new Map();
  }

  hello({ protocol }) {
    if (protocol !== PROTOCOL) throw new Unsendable(`protocol ${protocol} is asked for; this end speaks ${PROTOCOL}`);
    return { protocol: PROTOCOL, frame_mb: FRAME_MB, speaks: `Node ${process.versions.node}` };
  }

  open({ config, without_oracle }) {
    const settings = JSON.parse(config);
    this.make = () => {
      const made = new this.World(settings);
      if (!without_oracle) return made;
      if (typeof made.without_oracle !== "function") throw new Unsendable("the world has no method 'without_oracle'");
      return made.without_oracle();
    };
    this.asked = this.make();
    const abilities = ABILITIES.filter((name) => typeof this.asked[name] === "function");
    const { isolation, task, ...spec } = this.World.spec ?? {};
    return { abilities, spec: plain(spec, "spec") };
  }

  async split(name) {
    if (!this.splits.has(name)) this.splits.set(name, await this.asked.tasks(name));
    return this.splits.get(name);
  }

  async tasks({ split }) { return (await this.split(split)).length; }

  async task({ split, indices }) {
    const tasks = await this.split(split);
    return indices.map((k) => {
      if (!(k in tasks)) throw new Unsendable(`${split} has ${tasks.length} tasks, no ${k}`);
      return taskTold(tasks[k], `${split}[${k}]`);
    });
  }

  async named({ name }) { return taskTold(await this.asked.named(name), `named(${JSON.stringify(name)})`); }

  add({ instance }) { this.instances.set(instance, this.make()); return null; }

  found(instance) {
    if (!this.instances.has(instance)) throw new Unsendable(`there is no instance ${instance}`);
    return this.instances.get(instance);
  }

  async answer({ task, action }) { return this.answered(this.asked, taskMade(task), action); }

  async answered(world, task, action) {
    const answer = await world.answer(task, action);
    return answer == null ? null : text(answer, "answer");
  }

  async reset({ instance, task, seed }) {
    this.played.set(instance, taskMade(task));
    return observation(await this.found(instance).reset(this.played.get(instance), BigInt(seed)), "reset");
  }

  async step({ instance, action, snapshot }) {
    const world = this.found(instance);
    const [header, blobs] = timeStep(await world.step(action));
    if (header.answer === null && typeof world.answer === "function") {
      header.answer = (await this.answered(world, this.played.get(instance), action)) ?? "";
    }
    if (snapshot && !header.terminated && !header.truncated) header.snapshot = await this.snapshot({ instance });
    return [header, blobs];
  }

  async expert({ instance }) {
    const action = await this.found(instance).expert();
    return action == null ? null : text(action, "expert");
  }

  async random({ instance, seed }) { return text(await this.found(instance).random(BigInt(seed)), "random"); }

  async snapshot({ instance }) { return text(await this.found(instance).snapshot(), "snapshot"); }

  async restore({ instance, task, state }) {
    this.played.set(instance, taskMade(task));
    return observation(await this.found(instance).restore(this.played.get(instance), state), "restore");
  }

  cancel() { return null; }

  async drop({ instance }) {
    const world = this.instances.get(instance);
    this.instances.delete(instance);
    this.played.delete(instance);
    await world?.close();
    return null;
  }

  async close() {
    for (const instance of [...this.instances.keys()]) await this.drop({ instance });
    await this.asked?.close();
    return null;
  }
}

const CALLS = new Set("hello open tasks task named answer add reset step expert random snapshot restore cancel drop close".split(" "));

function send(buffer) {
  for (let at = 0; at < buffer.length; ) {
    try {
      at += writeSync(1, buffer, at);
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

export function serve(World) {
  const end = new FarEnd(World);
  const state = { held: Buffer.alloc(0) };
  // Standard output is the wire: what the world prints is for people.
  for (const name of ["log", "info", "debug"]) console[name] = console.error;
  async function answer({ id, call, blobs, ...details }) {
    let frame;
    try {
      if (!CALLS.has(call)) throw new Unsendable(`no call ${call}; this end speaks protocol ${PROTOCOL}`);
      const value = await end[call](details);
      frame = Array.isArray(value) && Array.isArray(value[1]) && "text" in (value[0].observation ?? value[0])
        ? pack({ id, value: value[0] }, value[1])
        : pack({ id, value });
    } catch (error) {
      const kind = error?.constructor?.name ?? "Error";
      frame = pack({ id, error: { kind, text: String(error?.message ?? error), traceback: String(error?.stack ?? "") } });
    }
    send(frame);
  }
  process.stdin.on("data", (chunk) => {
    for (const question of frames(state, chunk)) void answer(question);
  });
  // Nobody listens any more.
  process.stdin.on("end", () => process.exit(0));
}

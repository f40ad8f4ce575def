// The world of far_worlds.py, in Node.
const { serve } = await import(`${process.env.SELFWRIGHT_FAR_ENDS}/far_end.mjs`);
const { readFileSync } = await import("node:fs");

class Lamps {
  static spec = { repeatable: "exact", reward_range: [0, 1] };

  constructor({ picture = "", fault = "" }) {
    this.fault = fault;
    this.images = picture ? [readFileSync(picture)] : [];
  }

  tasks(split) {
    const steps = this.fault === "half a step" ? 12.5 : 12;
    return Array.from({ length: 40 }, (_, k) => ({
      id: `${split} ${k}`, instruction: "Find it.", max_steps: steps, goal: [2 + (k % 5), "söuth"],
      ...(this.fault === "a set" ? { lit: new Set([3]) } : {}),
    }));
  }

  reset(task, seed) {
    Object.assign(this, { task, at: 0, turn: 0, seed });
    return this.seen();
  }

  async step(action) {
    if (action === "die") throw new RangeError("half of it: \ud83d");
    this.turn += 1;
    this.at += { east: 1, west: -1 }[action] ?? 0;
    console.log("this is for people");
    if (this.fault === "half") return { observation: "half: \ud83d", reward: 0 };
    const found = this.at === this.task.goal[0];
    return { observation: this.seen(), reward: Number(found), terminated: found, success: found };
  }

  seen() {
    const text = `${this.seed} at lamp ${this.at} after ${this.turn}; lit is ${this.task.goal}`;
    return { text, images: this.images, actions: ["east", "west"] };
  }

  expert() { return this.at < this.task.goal[0] ? "east" : "west"; }
  snapshot() { return JSON.stringify([this.at, this.turn, String(this.seed)]); }
  restore(task, state) {
    const [at, turn, seed] = JSON.parse(state);
    Object.assign(this, { task, at, turn, seed });
    return this.seen();
  }
  close() {}
}

serve(Lamps);

# type: ignore
"""A world that knows nothing of selfwright: plain Python from 3.8, with numpy if it is there.

Walk along a line of lamps to the one that is lit. It is hosted by other interpreters, so nothing
here may need a newer Python, or a package.
"""

import json

try:
    import numpy
except ImportError:
    numpy = None

LENGTH = 8


class Lamps:
    spec = {"repeatable": "exact", "reward_range": [0.0, 1.0]}

    def __init__(self, picture="", fault=""):
        self.fault = fault
        self.png = b""
        if picture:
            with open(picture, "rb") as file:
                self.png = file.read()
        self.task, self.at, self.turn, self.seed = None, 0, 0, 0

    def tasks(self, split):
        steps = 12
        if self.fault == "numpy steps":
            steps = numpy.int64(12)
        more = {"lit": {3}} if self.fault == "a set" else {}
        return [
            dict(
                {
                    "id": "%s %d" % (split, k),
                    "instruction": "Find it.",
                    "max_steps": steps,
                    "goal": [2 + k % 5, "söuth"],
                },
                **more,
            )
            for k in range(40)
        ]

    def reset(self, task, seed):
        self.task, self.at, self.turn, self.seed = task, 0, 0, seed
        return self._seen(), {}

    async def step(self, action):
        if action == "die":
            raise ZeroDivisionError("half of it: \ud83d")
        self.turn += 1
        self.at += {"east": 1, "west": -1}.get(action, 0)
        found = self.at == self.task["goal"][0]
        reward = float(found)
        if numpy is not None:
            reward = numpy.float64(reward)
            if self.fault == "numpy reward":
                reward = numpy.float32(reward)
        if self.fault == "half":
            return "half: \ud83d", 0.0, False, False
        return self._seen(), reward, found, False, {"success": found}

    def _seen(self):
        text = "%d at lamp %d after %d; lit is %s" % (self.seed, self.at, self.turn, self.task.goal)
        return {"text": text, "images": [self.png] if self.png else [], "actions": ["east", "west"]}

    def expert(self):
        return "east" if self.at < self.task["goal"][0] else "west"

    def snapshot(self):
        return json.dumps([self.at, self.turn, self.seed])

    def restore(self, task, snapshot):
        self.task = task
        self.at, self.turn, self.seed = json.loads(snapshot)
        return self._seen()

    def close(self):
        pass

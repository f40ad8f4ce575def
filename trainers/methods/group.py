"""Group-relative policy gradients: GRPO, RLOO, Dr.GRPO, with GiGPO's step groups as an option."""

from ...core.types import Aggregation
from ..parts.advantage import Baseline
from ..parts.group_relative import LENGTH, GroupConfig, GroupRelative


class RLOOConfig(GroupConfig):
    baseline: Baseline = "rloo"
    aggregation: Aggregation = "seq-mean-token-sum"


class DrGRPOConfig(GroupConfig):
    baseline: Baseline = "dr_grpo"
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    length: int = LENGTH


class GRPO(GroupRelative):
    """Reinforces attempts that did better than their group (Shao et al. 2024, arXiv:2402.03300).

    The advantage of an attempt is that of each of its turns and tokens. With ``step_weight`` a turn
    also has one of its own, from its discounted return among all turns of the task's attempts that
    saw the same (GiGPO: Feng et al. 2025, arXiv:2505.10978); the score is paid with the last turn.

    Departures: there is no KL unless ``kl`` says so (GRPO: 0.04), and 8 attempts a task (64). A
    sequence is one turn, so that an attempt of many turns counts more. Statistics are over
    attempts, as in the papers, not over their turns as in some releases; a KL in the reward is
    charged once per attempt, summed over its tokens. GiGPO's returns are of the final score, not
    of each step's reward. Groups whose members all scored the same teach nothing, and if all are
    such there is no batch.
    """


class RLOO(GroupRelative):
    """Each attempt against the mean of the others (Ahmadian et al. 2024, arXiv:2402.14740).

    Departures: as ``GRPO``'s; and the ratio to the policy that sampled is clipped, where the paper
    has plain REINFORCE. The two are one as long as a batch is a single optimiser step.
    """

    Config = RLOOConfig


class DrGRPO(GroupRelative):
    """GRPO without its biases, of difficulty and of length (Liu et al. 2025, arXiv:2503.20783).

    Departures: as ``GRPO``'s; the constant that token sums are divided by is that of one turn.
    """

    Config = DrGRPOConfig

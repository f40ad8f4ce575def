"""Every error this package raises on purpose. Each is also a kind from the standard library."""


class SelfwrightError(Exception):
    """Catch this to catch all of them."""


class RecipeError(SelfwrightError, ValueError):
    """A recipe or a command line is malformed. The message lists every fault at once."""


class PluginError(SelfwrightError, LookupError):
    """A name matches no installed plug-in, or more than one."""


class WorldError(SelfwrightError, RuntimeError):
    """A world broke, hung, or answered with something that is not a time step."""


class WorkerLost(WorldError):
    """A worker that hosted worlds on a cluster is gone: no fault of the world's."""


class Late(SelfwrightError, TimeoutError):
    """The group of an episode was closed before its end."""


class TooManyFailures(SelfwrightError, RuntimeError):
    """More episodes failed than the recipe allows. Carries the first traceback."""


class PolicyError(SelfwrightError, RuntimeError):
    """A policy could not load a checkpoint or complete a prompt."""


class PromptError(PolicyError, ValueError):
    """A policy cannot read a prompt: too long, images for a model of text, no such roles."""


class PromptTooLong(PromptError):
    """A prompt, and what is to be sampled, are more than the model reads."""


class ModelError(PolicyError, ValueError):
    """The model that was named is not there, is not whole, or is of no use as a policy."""


class JudgeError(SelfwrightError, RuntimeError):
    """A judge broke, hung, or gave no usable verdict."""


class LearnerError(SelfwrightError, RuntimeError):
    """Nothing can be learned from a batch, or the learner was misused."""


class StoreError(SelfwrightError, ValueError):
    """A file of a run is missing, damaged, or belongs to another run."""


class DiskError(StoreError):
    """A file could not be written: the disk is full, or it may not be."""

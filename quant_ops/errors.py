"""Errors a user can act on: what, where, got, allowed, what to do. Every door shows them as one line."""


class QuantError(Exception):
    """Base of all FewBits errors; a door turns it into one line and exit status 2, or into a node error."""


class CheckpointError(QuantError):
    """A file is damaged, hostile, missing, unwritable or not what its name says."""


class RecipeError(QuantError):
    """A wish that cannot be fulfilled: unknown names, contradicting or malformed options."""


class UnsupportedLayerError(QuantError):
    """A layer that is read correctly but cannot run or be written here."""

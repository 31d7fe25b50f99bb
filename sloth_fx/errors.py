"""The one exception that the library raises for anything a caller can get wrong."""


class SlothError(ValueError):
    """Bad input: names what was asked, the site and shapes it concerns, and what would work."""


class RefusedInputsError(SlothError):
    """A model does not run on the inputs of a trial run."""

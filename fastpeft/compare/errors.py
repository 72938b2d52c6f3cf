"""The one exception that is the user's to mend."""


class BadInput(ValueError):
    """An argument, a file or a model that can't be used: one line saying what is wrong and what helps."""

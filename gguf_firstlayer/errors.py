"""The one exception that users see."""


class FirstLayerError(Exception):
    """Something that the user can act on; its message is one sentence that says what is wrong and what to do."""

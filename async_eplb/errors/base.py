"""The base of all errors of this package."""


class EplbError(Exception):
    """Base of every error that this package raises on purpose.

    The attributes are those of an update that ended early.

    :param committed_layers: layers that this rank has committed; all others are as they were. Other ranks have
        committed the same ones, unless a rank was lost or a copy failed (:class:`CommitFailed`): then ``recover()``
        makes them the same
    :param layer_under_way: the first layer that was not committed yet; -1 if there was none
    :param phase: how far that layer was on this rank: planning, transfer, staged, fence or commit
    """

    committed_layers: tuple[int, ...] = ()
    layer_under_way: int = -1
    phase: str = ""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.__dict__.update(facts)

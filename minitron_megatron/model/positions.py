"""Says where sequences are longer than a network was trained for."""

import logging

logger = logging.getLogger(__name__)


def warn_of_positions(max_positions: int | None, sequence_length: int, model: str) -> None:
    """Warns if sequences are longer than a network has positions, and says how such a network gets more.

    Args:
        max_positions: longest sequence that it was trained for, in tokens; None if that is not known.
        sequence_length: of the data.
        model: what it is of, such as "the student".
    """
    if max_positions is not None and sequence_length > max_positions:
        logger.warning(
            "data.sequence_length = %d is longer than the %d positions of %s, beyond which it knows nothing: shorten "
            "it, or extend the network where it is imported, by max_position_embeddings in config.json with a larger "
            "rope_theta, or rope_type llama3 in rope_parameters, and train it",
            sequence_length,
            max_positions,
            model,
        )

"""The numbers of token ids that a model embeds and generates."""

from typing import Any

from transformers import PreTrainedModel

from compiled_llm.errors import UnsupportedModelError


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that a prompt may use: the rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def vocab_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model generates: the rows of the output head.

    Some models embed a few more ids than they generate, such as the image token of Mllama.
    """
    head: Any = model.get_output_embeddings()
    return int(head.weight.shape[0])


def check_vocabulary(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if the model generates ids that it cannot embed.

    The next step would look up such an id beyond the end of the embedding.
    """
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        return  # examined on the meta device; an engine could not start
    embedded, generated = num_embeddings(model), vocab_size(model)
    if generated > embedded:
        raise UnsupportedModelError(
            f"{model.config.model_type}: expected an output head of at most as many rows as the "
            f"input embedding has, {embedded}, got {generated}, which is not supported"
        )

"""Pretrained language models, causal or masked: a hub name, a local folder or a GGUF file; adapters through PEFT."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MASKED_HEADS = ("ForMaskedLM", "ForPreTraining")
_WRONG = {
    "missing_keys": "lacks {} of the weights of {}, which would be random",
    "mismatched_keys": "has {} weights of other shapes than {}, which would be random",
    "conversion_errors": "has {} weights that transformers cannot bring into the form of {}",
    "error_msgs": "gives {} errors when it is loaded as {}",
}
"""What transformers says of weights that it did not load."""

_POSITIONS_AFTER_PADDING = {
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text"),
    *("ibert", "longformer", "luke", "mpnet", "esm"),
}
"""Model types whose positions begin after the padding token's index, and whose `max_position_embeddings` counts all."""


def load_model(
    pretrained: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a language model and its tokenizer.

    Args:
        pretrained: Name on the Hugging Face hub, local folder in its format, or a ``.gguf`` file.
        dtype: Type of the weights; they are read into it directly, so memory holds one copy. None: torch's default.
        revision: Branch, tag or commit on the hub.

    Returns:
        The network, in ``eval()`` mode on the CPU, and the tokenizer with a pad token.

    Raises:
        FileNotFoundError: If ``pretrained`` is a path and nothing is there.
        ModuleNotFoundError: If a GGUF file is named and the packages that read it are missing.
        OSError: If the hub does not give the model.
        ValueError: If the checkpoint lacks weights of the network, or is an encoder-decoder model.
    """
    return load_network(pretrained, dtype=dtype, revision=revision), load_tokenizer(pretrained, revision=revision)


def load_network(
    pretrained: str | Path, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> "PreTrainedModel":
    """Load the network alone, of the kind that `kind_of` says; arguments and errors as in `load_model`."""
    if _is_adapter(folder := Path(pretrained).expanduser()):
        return cast("PreTrainedModel", _load_adapter(folder, dtype))
    import transformers

    masked = kind_of(pretrained, revision=revision) == "masked"
    auto: Any = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    dtype = dtype or torch.get_default_dtype()
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if Path(pretrained).suffix == ".gguf" and hasattr(transformers, "GgufConfig"):
        # Quantized blocks cannot be perturbed. Releases without this class always dequantize them.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Lightning builds inside a device context, for which transformers would need accelerate.
    with torch.device("cpu"):
        network, loading = _from_pretrained(auto, pretrained, revision, **arguments)
    for key, what in _WRONG.items():
        if wrong := sorted(str(name) for name in loading.get(key) or ()):
            raise ValueError(
                f"pretrained={str(pretrained)!r} {what.format(len(wrong), type(network).__name__)}: "
                f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
            )
    if getattr(network, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"pretrained={str(pretrained)!r} holds a model and an adapter, and transformers would save the adapter "
            "alone: put the adapter's files into a folder of their own, and pass that one to train the adapter"
        )
    size = f"{sum(p.numel() for p in network.parameters()):,}"
    logger.info("%s: %s, %s parameters, %s, %s", pretrained, type(network).__name__, size, dtype, network.device)
    if masked:
        logger.info("%s is a masked language model: it answers where the prompt holds a mask", pretrained)
    return cast("PreTrainedModel", network.eval())


def kind_of(pretrained: "str | Path | nn.Module", *, revision: str | None = None) -> Literal["causal", "masked"]:
    """Whether a model, as in `load_model` or a network, is a causal or a masked language model.

    It is masked if its configuration names such a head (``RobertaForMaskedLM``), or names none and its type has such a
    head and is an encoder. Everything else, and every GGUF file, is causal; an encoder-decoder model is refused.
    """
    config: Any
    if isinstance(pretrained, nn.Module):
        base = getattr(pretrained, "get_base_model", None)
        network = base() if callable(base) else pretrained
        config, name = getattr(network, "config", None), type(network).__name__
        architectures = [name]
    else:
        folder = Path(pretrained).expanduser()
        if _is_adapter(folder):
            base, of_base = _base_of(folder)
            return kind_of(base, revision=of_base)
        if folder.suffix == ".gguf":
            return "causal"
        from transformers import AutoConfig

        config, name = _from_pretrained(AutoConfig, pretrained, revision), str(pretrained)
        architectures = config.architectures or []
    if getattr(config, "is_encoder_decoder", False) is True:
        raise ValueError(
            f"{name} is an encoder-decoder model ({config.model_type}): only causal models (LLaMA, OPT, GPT-2, ...) "
            "and masked ones (RoBERTa, BERT, ...) are supported"
        )
    if any(name.endswith(_MASKED_HEADS) for name in architectures):
        return "masked"
    if config is None or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "causal"
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", "")
    # BERT's family has both heads; a decoder is configured as one.
    encoder = (
        kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", None) is False
    )
    return "masked" if kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and encoder else "causal"


def position_limit(
    pretrained: "str | Path | nn.Module", virtual_tokens: int = 0, *, revision: str | None = None
) -> int | None:
    """The most tokens of a text that a model has positions for, by its configuration; None if that names no number.

    A sliding window is no limit. ``virtual_tokens`` of an adapter stand before the text, as do those of a network of
    PEFT.
    """
    config: Any
    if isinstance(pretrained, nn.Module):
        config = getattr(pretrained, "config", None)
        virtual_tokens = getattr(getattr(pretrained, "active_peft_config", None), "num_virtual_tokens", 0)
    else:
        from transformers import AutoConfig

        if _is_adapter(folder := Path(pretrained).expanduser()):
            settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            base, of_base = _base_of(folder)
            return position_limit(base, settings.get("num_virtual_tokens") or 0, revision=of_base)
        config = _from_pretrained(AutoConfig, pretrained, revision)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "yarn"):  # the number may be that of positions before they are scaled
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * (rope.get("factor") or 1.0)))
    if getattr(config, "model_type", None) in _POSITIONS_AFTER_PADDING:
        limit -= (config.pad_token_id or 0) + 1
    return limit - (virtual_tokens or 0)


TRUE_PRECISION = {
    torch.float64: "64-true",
    torch.float32: "32-true",
    torch.bfloat16: "bf16-true",
    torch.float16: "16-true",
}


def precision_of(asked: str | int, network: nn.Module) -> str:
    """The precision that a network runs in: a mixed one as asked, else that of most of its weights."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in network.parameters():
        sizes[parameter.dtype] += parameter.numel()
    if "mixed" in str(asked) or not sizes:
        return str(asked)
    return TRUE_PRECISION.get(sizes.most_common(1)[0][0], str(asked))


def load_tokenizer(pretrained: str | Path, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer alone, padding on the left; arguments and errors as in `load_model`."""
    from transformers import AutoTokenizer

    folder = Path(pretrained).expanduser()
    if _is_adapter(folder) and not any(folder.glob("tokenizer*")):
        base, of_base = _base_of(folder)
        return load_tokenizer(base, revision=of_base)
    return with_pad_token(_from_pretrained(AutoTokenizer, pretrained, revision))


def with_pad_token(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Give a tokenizer that has no pad token one of its own tokens for it (padding is masked, so any will do)."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
        logger.info("the tokenizer has no pad token: %r pads", tokenizer.pad_token)
    return tokenizer


def add_adapter(model: nn.Module, adapter: Mapping[str, Any], *, seed: int = 0) -> nn.Module:
    """Freeze a network and put a PEFT adapter on it, which alone is trained; in ``eval()`` mode.

    ``adapter`` holds ``peft_type`` (``LORA``, ``PREFIX_TUNING``, ...) and the arguments of PEFT's configuration of that
    type. Its starting weights are a function of ``seed``; torch's generator is left as it was.
    """
    peft = _peft()
    types: dict[Any, Any] = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    arguments = dict(adapter)
    if not type(model).__name__.endswith(_MASKED_HEADS):  # PEFT's plain wrapper takes masked language models
        arguments.setdefault("task_type", "CAUSAL_LM")
    kind = str(arguments.pop("peft_type", "")).upper()
    if kind not in types:
        raise ValueError(
            f"adapter needs peft_type, one of {', '.join(sorted(types))}; got {adapter.get('peft_type')!r}"
        )
    default = torch.get_default_dtype()
    try:
        settings = types[kind](**arguments)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 by a name that it will drop in version 6.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            torch.manual_seed(seed)
            # Drawn in the network's dtype, so that they are the same inside a Trainer's precision and outside.
            torch.set_default_dtype(next(model.parameters()).dtype)
            wrapped: nn.Module = peft.get_peft_model(model, settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter={dict(adapter)}: {error}") from error
    finally:
        torch.set_default_dtype(default)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    logger.info("adapter %s: %s parameters are trained, the others are frozen", kind, f"{trained:,}")
    return wrapped.eval()


def adapter_kinds(network: nn.Module) -> list[str]:
    """The ``peft_type`` of each adapter of a network of PEFT; none for another network."""
    settings = getattr(network, "peft_config", None)
    return [str(one.peft_type.value) for one in settings.values()] if isinstance(settings, dict) else []


def _load_adapter(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    """An adapter that PEFT saved, on its base model, which is frozen; the adapter is trained on."""
    peft = _peft()
    name, revision = _base_of(folder)
    try:
        base = load_network(name, dtype=dtype, revision=revision)
    except (OSError, ValueError) as error:
        raise type(error)(f"{folder / 'adapter_config.json'} names the base model {name!r}: {error}") from error
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(base.dtype)
        settings = peft.PeftConfig.from_pretrained(str(folder))
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            # PEFT refuses to make a prompt trainable, whose saved embeddings are so anyway.
            network: nn.Module = peft.PeftModel.from_pretrained(
                base, str(folder), is_trainable=not settings.is_prompt_learning
            )
        saved, loaded = peft.utils.load_peft_weights(str(folder), "cpu"), peft.get_peft_model_state_dict(network)
        differing = [
            key
            for key in saved.keys() | loaded.keys()
            if key not in saved or key not in loaded or not torch.equal(saved[key].to(loaded[key].dtype), loaded[key])
        ]
        if differing:
            raise ValueError(f"{len(differing)} of its weights are not those of the file: {sorted(differing)[:3]}")
    except (ArithmeticError, LookupError, RuntimeError, TypeError, UserWarning, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"pretrained={str(folder)!r}: PEFT does not load this adapter: {reason:.300}") from error
    finally:
        torch.set_default_dtype(default)
    others = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if others:
        logger.warning("%s: the adapters in its folders %s are not loaded", folder, ", ".join(others))
    trained = f"{sum(p.numel() for p in network.parameters() if p.requires_grad):,}"
    logger.info("%s: a %s adapter, of which %s parameters are trained", folder, settings.peft_type.value, trained)
    return network.eval()


def _peft() -> Any:
    if find_spec("peft") is None:
        raise ModuleNotFoundError("adapter needs peft: pip install 'smezo_pl[peft]'")
    import peft

    return peft


def _is_adapter(folder: Path) -> bool:
    whole = (path for kind in ("model*.safetensors", "pytorch_model*.bin") for path in folder.glob(kind))
    return (folder / "adapter_config.json").is_file() and not any(whole)


def _base_of(folder: Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter is for."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = settings.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base model: add it as base_model_name_or_path")
    return str(name), settings.get("revision")


def _from_pretrained(auto: Any, pretrained: str | Path, revision: str | None, **arguments: Any) -> Any:
    folder, location = _locate(pretrained, revision)
    try:
        return auto.from_pretrained(folder, **location, **arguments)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"pretrained={str(pretrained)!r} is neither a folder nor a .gguf file here, and the Hugging Face hub did "
            f"not give it: {reason} (offline? `hf download {pretrained}` keeps a copy that later runs find)"
        ) from error


def _locate(pretrained: str | Path, revision: str | None) -> tuple[str, dict[str, Any]]:
    """A folder or hub name, and the arguments of transformers that go with it."""
    name = str(pretrained)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"pretrained={name!r}: there is no such file")
        if missing := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
            raise ModuleNotFoundError(
                f"a GGUF file needs {' and '.join(missing)}: pip install 'smezo_pl[gguf]' (pretrained={name!r})"
            )
        return str(path.parent), {"gguf_file": path.name}
    if name and path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; name one of its GGUF files: {', '.join(ggufs)}" if ggufs else ""
            if adapters := sorted(p.parent.name for p in path.glob("*/adapter_config.json")):
                hint = f"; name the folder of one of its adapters: {', '.join(adapters)}"
            raise FileNotFoundError(f"pretrained={name!r}: the folder holds no config.json{hint}")
        return str(path), {}
    # A hub name is `name` or `owner/name`: anything else can only be a path.
    if path.is_file() or not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(
            f"pretrained={name!r}: there is no such folder (a path must be a folder with config.json, or a .gguf file)"
        )
    return name, {"revision": revision} if revision else {}

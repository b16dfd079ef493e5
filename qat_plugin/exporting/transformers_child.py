"""Run by another interpreter, which never imports this package: loads a directory with transformers and is asked.

Its first argument is the folder; each line of its input is a name, and each line of its output the file in which the
answer lies: the tensors of one parameter, or, for ``=logits``, what the model gives for ``sample.safetensors``.
"""

import json
import os
import sys


def parts_of(model, name, folder):  # type: ignore[no-untyped-def]
    """Plain tensors of one parameter, the class or format that holds them there, and how inputs are rounded."""
    stem, _, leaf = name.rpartition(".")
    module = model.get_submodule(stem)
    held = module.get_buffer(leaf) if leaf in module._buffers else module._parameters.get(leaf)
    scheme = getattr(module, "quantization_scheme", None)
    if leaf == "weight" and scheme is not None:
        parts, kind = unpacked({n: value.detach() for n, value in module.named_parameters(recurse=False)}, scheme)
        if "input_scale" in parts:  # loading may round it
            parts["stored_input_scale"] = stored(folder, stem)["input_scale"]
        return parts, kind
    scheme = compressed_scheme(folder, stem, module) if leaf == "weight" else None
    if scheme is not None:  # dequantized while it was loaded
        parts, kind = unpacked(stored(folder, stem), scheme)
        return {**parts, "dense": module.weight.detach()}, kind
    if held is None:
        raise KeyError(f"the model has no parameter {name}")
    if not hasattr(held, "tensor_data_names"):
        return {"": held.detach()}, type(held).__name__
    rounds = getattr(held, "activation_quantization", None) or getattr(held, "act_quant_kwargs", None)
    kind = type(held).__name__ + (", inputs per token" if rounds is not None else "")
    return {part: getattr(held, part).detach() for part in held.__tensor_flatten__()[0]}, kind


def compressed_scheme(folder, stem, module):  # type: ignore[no-untyped-def]
    """The scheme that compressed-tensors' own matching gives a layer, or None."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        given = json.load(file).get("quantization_config", {})
    if given.get("quant_method") != "compressed-tensors":
        return None
    from compressed_tensors.utils.match import is_match
    from transformers import CompressedTensorsConfig

    config = CompressedTensorsConfig.from_dict(given).quantization_config
    groups = config.config_groups.values()
    return next((g for g in groups if is_match(stem, module, g.targets, config.ignore or ())), None)


def stored(folder, stem):  # type: ignore[no-untyped-def]
    """What the files hold of one layer."""
    from safetensors import safe_open

    found = {}
    for file in sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")):
        with safe_open(os.path.join(folder, file), framework="pt") as tensors:
            own = [key for key in tensors.keys() if key.rpartition(".")[0] == stem]  # noqa: SIM118
            found.update({key.rpartition(".")[2]: tensors.get_tensor(key) for key in own})
    return found


def unpacked(held, scheme):  # type: ignore[no-untyped-def]
    """Integers of a compressed layer, unpacked by compressed-tensors' own function, and what the layer is."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits = scheme.weights.num_bits
    if "weight_packed" in held:
        shape = torch.Size(held.pop("weight_shape").tolist())
        held["weight"] = unpack_from_int32(held.pop("weight_packed"), bits, shape)
        if "weight_zero_point" in held:
            rows = torch.Size((shape[0], held["weight_scale"].shape[-1]))
            held["weight_zero_point"] = unpack_from_int32(held["weight_zero_point"], bits, rows, packed_dim=0)
    inputs = scheme.input_activations
    rounded = f", inputs per {getattr(inputs.strategy, 'value', inputs.strategy)}" if inputs is not None else ""
    return held, str(getattr(scheme.format, "value", scheme.format)) + rounded


def main():  # type: ignore[no-untyped-def]
    """Load, then answer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder, place, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if "qat_plugin" in sys.modules:
        raise RuntimeError("this interpreter has imported qat_plugin: it is no independent reader")
    wrong = {key: sorted(map(str, names)) for key, names in loaded.items() if names}
    print(f"loaded {wrong or ''}".strip(), flush=True)
    for line in sys.stdin:
        name, file = line.rstrip("\n"), os.path.join(place, "answer.safetensors")
        if name == "=logits":
            with torch.no_grad():
                tensors, kind = {"": model(**load_file(os.path.join(place, "sample.safetensors"))).logits.float()}, ""
        else:
            tensors, kind = parts_of(model, name, folder)
        save_file({f".{key}": value.contiguous().clone() for key, value in tensors.items()}, file, {"kind": kind})
        print(file, flush=True)


if __name__ == "__main__":
    main()

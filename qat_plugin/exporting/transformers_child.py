"""Run by another interpreter, which never imports this package: loads a directory with transformers and is asked.

Its first argument is the folder; each line of its input is a name, and each line of its output the file in which the
answer lies: the tensors of one parameter, or, for the name ``=logits``, what the model gives for ``sample.safetensors``.
"""

import os
import sys


def parts_of(model, name):  # type: ignore[no-untyped-def]
    """Plain tensors of one parameter, and the class that holds them, as the quantization's own library unpacks them."""
    module = model.get_submodule(name.rpartition(".")[0])
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and name.endswith(".weight"):
        return compressed(module, scheme)
    held = getattr(module, name.rpartition(".")[2])
    if not hasattr(held, "tensor_data_names"):
        return {"": held.detach()}, type(held).__name__
    names, _ = held.__tensor_flatten__()
    return {part: getattr(held, part).detach() for part in names}, type(held).__name__


def compressed(module, scheme):  # type: ignore[no-untyped-def]
    """What compressed-tensors holds of a layer, packed integers unpacked by its own function."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    held = {name: value.detach() for name, value in module.named_parameters(recurse=False)}
    bits = scheme.weights.num_bits
    if "weight_packed" in held:
        shape = torch.Size(held.pop("weight_shape").tolist())
        held["weight"] = unpack_from_int32(held.pop("weight_packed"), bits, shape)
        if "weight_zero_point" in held:
            rows = torch.Size((shape[0], held["weight_scale"].shape[-1]))
            held["weight_zero_point"] = unpack_from_int32(held["weight_zero_point"], bits, rows, packed_dim=0)
    return held, str(getattr(scheme.format, "value", scheme.format))


def main():  # type: ignore[no-untyped-def]
    """Load, then answer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder, place, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {key: sorted(map(str, names)) for key, names in loaded.items() if names}
    print(f"loaded {wrong or ''}".strip(), flush=True)
    for line in sys.stdin:
        name, file = line.rstrip("\n"), os.path.join(place, "answer.safetensors")
        if name == "=logits":
            with torch.no_grad():
                tensors, kind = {"": model(**load_file(os.path.join(place, "sample.safetensors"))).logits.float()}, ""
        else:
            tensors, kind = parts_of(model, name)
        save_file({f".{key}": value.contiguous().clone() for key, value in tensors.items()}, file, {"kind": kind})
        print(file, flush=True)


if __name__ == "__main__":
    main()

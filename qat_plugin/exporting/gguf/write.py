"""Writes the file: keys, then tensor after tensor, one in memory at a time."""

from __future__ import annotations

from pathlib import Path

from qat_plugin.exporting.contents import Exportable
from qat_plugin.exporting.formats import Told
from qat_plugin.exporting.gguf import schemes, splitting
from qat_plugin.exporting.gguf.families import family_of
from qat_plugin.exporting.gguf.layout import arrays, layout
from qat_plugin.exporting.gguf.metadata import add_metadata
from qat_plugin.exporting.gguf.options import Options
from qat_plugin.exporting.gguf.seal import BLANK, DATA_SEAL, SEAL, seal
from qat_plugin.exporting.gguf.vocabulary import vocabulary_of


def write_file(model: Exportable, path: Path, options: Options, progress: Told, *, sealed: bool = True) -> None:
    """Write all of it.

    Args:
        model: converted.
        path: the file.
        options: of the format.
        progress: told the number of tensors written.
        sealed: with the trained schemes and checksums in it; not where another program copies the keys into its own.
    """
    import gguf
    import numpy as np

    entries = layout(model, options)
    writer = gguf.GGUFWriter(path, family_of(model.config, model.network).architecture)
    try:
        add_metadata(writer, model, options, entries)
        vocabulary_of(model, options).add_to(writer)
        if sealed:
            writer.add_string(schemes.KEY, schemes.spelled(model, entries))
            if model.tokenizer is not None:
                writer.add_string(splitting.KEY, splitting.splitting_of(model.tokenizer))
            for key in (SEAL, DATA_SEAL):
                writer.add_string(key, BLANK)
        for entry in entries:
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for written, array in enumerate(arrays(model, entries), 1):
            writer.write_tensor_data(array)
            progress(written)
    finally:
        writer.close()
    if sealed:
        seal(path)

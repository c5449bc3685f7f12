"""Reads an exported model folder back into models.py, without diffusers. Used by check_export.py and model_card.py."""
import json

import torch
from safetensors.torch import load_file

from models import AutoencoderKL, DiT


def load_tensors(folder):
    """All tensors of a folder's safetensors files, as f32."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SystemExit(f"{folder.name}: {name} is not finite")
    return {name: tensor.float() for name, tensor in tensors.items()}


def load_dit(folder):
    """folder: the `transformer` folder. The inverse of DiT.export; refuses a file that the export would not write so."""
    config, given = json.loads((folder / "config.json").read_text()), load_tensors(folder)
    heads, depth = config["num_attention_heads"], config["num_layers"]
    dit = DiT(heads * config["attention_head_dim"], heads, depth, config["num_embeds_ada_norm"], config["sample_size"],
              config["patch_size"], config["in_channels"])
    wanted = dit.export(dit.state_dict())
    for name in sorted(set(wanted) | set(given)):
        if name not in given or name not in wanted or given[name].shape != wanted[name].shape:
            found = tuple(given[name].shape) if name in given else "nothing"
            raise SystemExit(f"{name}: expected {tuple(wanted[name].shape) if name in wanted else 'nothing'}, found {found}")

    state, embedders = {}, "transformer_blocks.0.norm1.emb."
    for kind in ("weight", "bias"):
        state[f"patch_embed.{kind}"] = given[f"pos_embed.proj.{kind}"]
        state[f"temb1.{kind}"] = given[f"{embedders}timestep_embedder.linear_1.{kind}"]
        state[f"temb2.{kind}"] = given[f"{embedders}timestep_embedder.linear_2.{kind}"]
        state[f"final_mod.{kind}"] = given[f"proj_out_1.{kind}"]
        state[f"final.{kind}"] = given[f"proj_out_2.{kind}"]
        for i in range(depth):
            src, dst = f"transformer_blocks.{i}.", f"blocks.{i}."
            state[f"{dst}qkv.{kind}"] = torch.cat([given[f"{src}attn1.{n}.{kind}"] for n in ("to_q", "to_k", "to_v")])
            state[f"{dst}out.{kind}"] = given[f"{src}attn1.to_out.0.{kind}"]
            state[f"{dst}fc1.{kind}"] = given[f"{src}ff.net.0.proj.{kind}"]
            state[f"{dst}fc2.{kind}"] = given[f"{src}ff.net.2.{kind}"]
            state[f"{dst}mod.{kind}"] = given[f"{src}norm1.linear.{kind}"]
    state["labels.weight"] = given[f"{embedders}class_embedder.embedding_table.weight"]
    dit.load_state_dict(state)
    for name, tensor in dit.export(dit.state_dict()).items():  # all copies of the embedders must be equal
        if not torch.equal(tensor, given[name]):
            raise SystemExit(f"{name}: differs from the copy in block 0")
    return dit.requires_grad_(False).eval()


def load_vae(folder):
    """folder: the `vae` folder. Returns the model and its scaling factor."""
    config = json.loads((folder / "config.json").read_text())
    vae = AutoencoderKL(tuple(config["block_out_channels"]), config["layers_per_block"], config["norm_num_groups"],
                        config["latent_channels"])
    vae.load_state_dict(load_tensors(folder))
    return vae.requires_grad_(False).eval(), config["scaling_factor"]

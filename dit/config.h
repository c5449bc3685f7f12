/* dit/config.h - config files to descriptions.
 *
 * Reads  diffusers' transformer/config.json of DiTTransformer2DModel and of old Transformer2DModel files with ada_norm_zero,
 *        and a config.json of the original DiT layout (hidden_size, depth, num_heads, ...).
 * The two layouts compute different numbers from the same weights; the differences are fields of rf_dit_desc:
 *                        diffusers                 original
 *   freq_shift           1  (10000^(-i/127))       0  (10000^(-i/128))
 *   MLP norm eps         norm_eps (default 1e-5)   1e-6
 *   guided_channels      all                       3 */
#ifndef RF_DIT_CONFIG_H
#define RF_DIT_CONFIG_H

#include "core/json.h"
#include "dit/blocks.h"

#ifdef __cplusplus
extern "C" {
#endif

/* From a parsed transformer config. RF_ERR_CONFIG / RF_ERR_MISSING / RF_ERR_UNSUPPORTED name the key. */
rf_status rf_dit_config_read(rf_dit_desc *out, const rf_json *config, rf_error *err);

/* Built-in shapes for synthetic weights: "dit-xl-2-256", "dit-xl-2-512", "dit-l-2-256", "dit-b-2-256", "dit-s-2-256", and the
 * same with patch 4 and 8. RF_ERR_ARGUMENT lists them. */
rf_status rf_dit_config_builtin(rf_dit_desc *out, const char *name, rf_error *err);
/* index-th built-in name, NULL past the end. */
const char *rf_dit_config_builtin_name(int index);

/* open-oasis: the arguments of its DiT as an object of a larger file: input_h, input_w (latent), patch_size, in_channels, hidden_size, depth,
 * num_heads, mlp_ratio, external_cond_dim, max_frames (becomes sample_frames). Absent keys take the public model's values. */
rf_status rf_dit_config_read_oasis(rf_dit_desc *out, const rf_json *doc, const rf_json_value *object, rf_error *err);
/* The public 500M model. */
rf_dit_desc rf_dit_config_oasis(void);

#ifdef __cplusplus
}
#endif
#endif

/* samples/refrain/info_world.c */
#include "samples/refrain/info_world.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "dit/config.h"
#include "dit/vit_vae.h"
#include "samples/refrain/flops.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"

#define RELEASE_DIT "oasis500m.safetensors"
#define RELEASE_VAE "vit-l-20.safetensors"

typedef struct {
    const char *dir;
    rf_json *config; /* NULL: the public release, whose config is built in */
    rf_json *cache;  /* cache.json or NULL */
    rf_dit_desc dit;
    rf_vit_vae_config vae;
    weights_summary transformer, autoencoder;
    double fps, scaling;
    int64_t num_steps, stabilization;
    const char *simulator;
    int64_t tokens; /* of a frame */
    char blocks[512];
} world_summary;

static bool in_folder(const char *dir, const char *name) {
    char *path = rf_path_join(dir, name);
    bool found = path && rf_path_exists(path);
    rf_free(path);
    return found;
}

static rf_status open_in(rf_json **out, const char *dir, const char *name, rf_error *err) {
    char *path = rf_path_join(dir, name);
    rf_status st = path ? rf_json_open(out, path, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", dir);
    rf_free(path);
    return st;
}

/* The index of shards, if there is one, else the one file. */
static rf_status summarize_file(weights_summary *out, const char *dir, const char *stem, rf_error *err) {
    char name[96];
    rf_weights *weights = NULL;
    snprintf(name, sizeof name, "%s.index.json", stem);
    char *path = rf_path_join(dir, in_folder(dir, name) ? name : stem);
    rf_status st =
        path ? rf_weights_open(&weights, path, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", dir);
    if (st == RF_OK) *out = weights_summarize(weights);
    rf_weights_close(weights);
    rf_free(path);
    return st;
}

static rf_status read_config(world_summary *w, rf_error *err) {
    const rf_json *doc = w->config;
    const rf_json_value *root = rf_json_root(doc), *dit = rf_json_get(root, "dit"), *vae = rf_json_get(root, "vae");
    if (!dit || !vae || !rf_json_is_object(dit) || !rf_json_is_object(vae))
        return rf_fail(err, RF_ERR_CONFIG, "%s: expected objects \"dit\" and \"vae\"", rf_json_name(doc));
    RF_TRY(rf_dit_config_read_oasis(&w->dit, doc, dit, err));
    RF_TRY(rf_vit_vae_config_read(&w->vae, doc, vae, err));
    RF_TRY(rf_json_opt_double(doc, root, "scaling_factor", 1e-6, 1e6, w->scaling, &w->scaling, err));
    RF_TRY(rf_json_opt_double(doc, root, "fps", 0.01, 1000, w->fps, &w->fps, err));
    RF_TRY(rf_json_opt_int(doc, root, "steps", 1, 1000, w->num_steps, &w->num_steps, err));
    RF_TRY(rf_json_opt_int(doc, root, "stabilization_level", 1, 1000, w->stabilization, &w->stabilization, err));
    return rf_json_has(root, "simulator") ? rf_json_opt_string(doc, root, "simulator", "", &w->simulator, err) : RF_OK;
}

static rf_status read_world(world_summary *w, rf_error *err) {
    bool release = in_folder(w->dir, RELEASE_DIT);
    w->dit = rf_dit_config_oasis();
    w->vae = rf_vit_vae_config_oasis();
    w->scaling = w->vae.scaling_factor;
    w->fps = 20; /* of the public model, as the next two */
    w->num_steps = 10;
    w->stabilization = 15;
    if (!release || in_folder(w->dir, "config.json")) {
        RF_TRY(open_in(&w->config, w->dir, "config.json", err));
        RF_TRY(read_config(w, err));
    }
    if (in_folder(w->dir, "cache.json")) RF_TRY(open_in(&w->cache, w->dir, "cache.json", err));
    w->tokens = w->dit.sample_size / w->dit.ph * (w->dit.sample_width / w->dit.pw);
    RF_TRY(summarize_file(&w->transformer, w->dir, release ? RELEASE_DIT : "dit.safetensors", err));
    return summarize_file(&w->autoencoder, w->dir, release ? RELEASE_VAE : "vae.safetensors", err);
}

/* ---- blocks as dit/blocks.h writes them ---- */

static void part_text(const rf_dit_desc *d, const rf_part_desc *part, char *text, size_t bytes) {
    static const char *const kinds[] = {
        [RF_PART_SELF] = "SELF", [RF_PART_CROSS] = "CROSS", [RF_PART_MLP] = "MLP", [RF_PART_PARALLEL] = "PARALLEL"};
    const char *scope = part->scope == RF_SCOPE_FRAME   ? "frame"
                        : part->scope == RF_SCOPE_PIXEL ? part->causal_frames ? "over frames, causal" : "over frames"
                                                        : "all";
    if (part->kind == RF_PART_MLP) {
        snprintf(text, bytes, "MLP(%" PRId64 ")", part->ffn_dim);
    } else if (part->rope >= 0) {
        snprintf(text, bytes, "%s(%s; rotary, %s)", kinds[part->kind], scope,
                 d->ropes[part->rope].kind == RF_ROPE_AXIAL ? "axial" : "time");
    } else {
        snprintf(text, bytes, "%s(%s)", kinds[part->kind], scope);
    }
}

static void blocks_text(world_summary *w) {
    size_t used = 0;
    for (int g = 0; g < w->dit.num_groups; g++) {
        const rf_block_group *group = &w->dit.groups[g];
        used += (size_t)snprintf(w->blocks + used, sizeof w->blocks - used, "%s%d x {", g ? " " : "", group->count);
        for (int p = 0; p < group->num_parts; p++) {
            char part[96];
            part_text(&w->dit, &group->parts[p], part, sizeof part);
            if (used + strlen(part) + 8 > sizeof w->blocks) return;
            used += (size_t)snprintf(w->blocks + used, sizeof w->blocks - used, " %s", part);
        }
        used += (size_t)snprintf(w->blocks + used, sizeof w->blocks - used, " }");
    }
}

/* ---- out ---- */

static double weight_bytes(const world_summary *w, rf_dtype dtype) {
    return (double)(w->transformer.num_params + w->autoencoder.num_params) * (double)rf_dtype_bytes(dtype);
}

static double kept_bytes(const world_summary *w, rf_dtype dtype) {
    return context_elems(&w->dit, (double)w->tokens) * (double)rf_dtype_bytes(dtype);
}

/* GFLOP of one frame through the transformer that sees `seen` frames, itself counted. */
static double gflop(const world_summary *w, double seen) {
    return forward_flops(&w->dit, (double)w->tokens, seen) / 1e9;
}

static const rf_json_value *first_action(const world_summary *w) {
    const rf_json_value *list = w->config ? rf_json_get(rf_json_root(w->config), "actions") : NULL;
    return list && !rf_json_is_object(list) ? list->child : NULL;
}

static void print_actions(const world_summary *w) {
    int num = 0, column = 13;
    printf("actions      ");
    for (const rf_json_value *a = first_action(w); a; a = a->next, num++) {
        const char *name = rf_json_string(a) ? rf_json_string(a) : "(not a name)";
        if (num && column + (int)strlen(name) + 2 > 80) {
            printf(",\n             ");
            column = 13;
        } else if (num) {
            printf(", ");
            column += 2;
        }
        print_clean(name);
        column += (int)strlen(name);
    }
    printf(num ? "\n" : "%d numbers a frame\n", w->dit.action_dim);
}

static void print_tables(const world_summary *w) {
    if (!w->cache) return;
    const char *between = "";
    printf("measured     ");
    for (const rf_json_value *v = rf_json_root(w->cache)->child; v; v = v->next) {
        printf("%s", between);
        print_clean(v->string ? v->string : "");
        between = ", ";
    }
    printf(" (cache.json)\n");
}

static void print_world(const world_summary *w) {
    const rf_dit_desc *d = &w->dit;
    char f32[32], bf16[32], kept[32], kept_half[32];
    int window = (int)d->sample_frames, steps = (int)w->num_steps;
    format_bytes(f32, sizeof f32, weight_bytes(w, RF_DTYPE_F32));
    format_bytes(bf16, sizeof bf16, weight_bytes(w, RF_DTYPE_BF16));
    format_bytes(kept, sizeof kept, kept_bytes(w, RF_DTYPE_F32));
    format_bytes(kept_half, sizeof kept_half, kept_bytes(w, RF_DTYPE_BF16));
    printf("model        ");
    print_clean(w->dir);
    printf("\nfamily       %s, a world model\n", d->family);
    printf("transformer  %.2f M parameters in %s (%zu tensors): %d blocks, width %" PRId64
           ", %d heads of %d, patch %d\n",
           (double)w->transformer.num_params / 1e6, w->transformer.dtype, w->transformer.num_tensors,
           rf_dit_desc_num_blocks(d), d->width, d->num_heads, d->head_dim, d->ph);
    printf("blocks       %s\n", w->blocks);
    printf("vae          %.2f M parameters in %s: ViT, encoder %d x %d, decoder %d x %d, patch %d, scaling %g\n",
           (double)w->autoencoder.num_params / 1e6, w->autoencoder.dtype, w->vae.enc_depth, w->vae.enc_dim,
           w->vae.dec_depth, w->vae.dec_dim, w->vae.patch_size, w->scaling);
    printf("frames       %dx%d, %g a second (latent %dx%" PRId64 "x%" PRId64 ", %" PRId64 " tokens)\n",
           w->vae.input_width, w->vae.input_height, w->fps, d->in_channels, d->sample_size, d->sample_width, w->tokens);
    printf("window       %d frames, the new one included; context told level %" PRId64 "\n", window, w->stabilization);
    print_actions(w);
    printf("steps        %d a frame, v prediction, sigmoid schedule\n", steps);
    printf("simulator    ");
    print_clean(w->simulator ? w->simulator : "none");
    printf("\nweights      %s in f32, %s in bf16\n", f32, bf16);
    printf("kept frame   %s in f32, %s in bf16 of keys and values\n", kept, kept_half);
    printf("cost         %.3f GFLOP a frame through the transformer (%.3f with the window full);\n"
           "             a new frame %.2f with exact reuse, %.2f computing the window in every step\n",
           gflop(w, 1), gflop(w, window), steps * gflop(w, window) + gflop(w, window - 1),
           steps * window * gflop(w, (window + 1) / 2.0));
    print_tables(w);
}

static rf_status print_world_json(const world_summary *w, rf_error *err) {
    const rf_dit_desc *d = &w->dit;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "info");
    cJSON_AddStringToObject(root, "model", w->dir);
    cJSON_AddStringToObject(root, "family", d->family);
    cJSON_AddBoolToObject(root, "world", true);
    cJSON *transformer = weights_summary_json(&w->transformer);
    cJSON_AddNumberToObject(transformer, "blocks", rf_dit_desc_num_blocks(d));
    cJSON_AddStringToObject(transformer, "grammar", w->blocks);
    cJSON_AddNumberToObject(transformer, "width", (double)d->width);
    cJSON_AddNumberToObject(transformer, "heads", d->num_heads);
    cJSON_AddNumberToObject(transformer, "head_dim", d->head_dim);
    cJSON_AddNumberToObject(transformer, "patch", d->ph);
    cJSON_AddNumberToObject(transformer, "tokens", (double)w->tokens);
    cJSON_AddItemToObject(root, "transformer", transformer);
    cJSON *vae = weights_summary_json(&w->autoencoder);
    cJSON_AddNumberToObject(vae, "latent_channels", w->vae.latent_dim);
    cJSON_AddNumberToObject(vae, "patch", w->vae.patch_size);
    cJSON_AddNumberToObject(vae, "scaling_factor", w->scaling);
    cJSON_AddItemToObject(root, "vae", vae);
    cJSON_AddNumberToObject(root, "width", w->vae.input_width);
    cJSON_AddNumberToObject(root, "height", w->vae.input_height);
    cJSON_AddNumberToObject(root, "fps", w->fps);
    cJSON_AddNumberToObject(root, "window", (double)d->sample_frames);
    cJSON_AddNumberToObject(root, "steps", (double)w->num_steps);
    cJSON_AddNumberToObject(root, "stabilization_level", (double)w->stabilization);
    cJSON_AddNumberToObject(root, "action_dim", d->action_dim);
    cJSON *actions = cJSON_AddArrayToObject(root, "actions");
    for (const rf_json_value *a = first_action(w); a; a = a->next) {
        if (rf_json_string(a)) cJSON_AddItemToArray(actions, cJSON_CreateString(rf_json_string(a)));
    }
    cJSON_AddItemToObject(root, "simulator", w->simulator ? cJSON_CreateString(w->simulator) : cJSON_CreateNull());
    cJSON *memory = cJSON_AddObjectToObject(root, "memory");
    cJSON_AddNumberToObject(memory, "weights_f32_bytes", weight_bytes(w, RF_DTYPE_F32));
    cJSON_AddNumberToObject(memory, "weights_bf16_bytes", weight_bytes(w, RF_DTYPE_BF16));
    cJSON_AddNumberToObject(memory, "kept_frame_f32_bytes", kept_bytes(w, RF_DTYPE_F32));
    cJSON_AddNumberToObject(memory, "kept_frame_bf16_bytes", kept_bytes(w, RF_DTYPE_BF16));
    cJSON_AddNumberToObject(root, "frame_forward_gflop", gflop(w, 1));
    cJSON_AddNumberToObject(root, "frame_forward_full_window_gflop", gflop(w, (double)d->sample_frames));
    return report_print_json(root, err);
}

rf_status info_world(const char *dir, bool json, rf_error *err) {
    world_summary w = {.dir = dir};
    rf_status st = read_world(&w, err);
    if (st == RF_OK) {
        blocks_text(&w);
        if (json) {
            st = print_world_json(&w, err);
        } else {
            print_world(&w);
        }
    }
    rf_json_close(w.config);
    rf_json_close(w.cache);
    return st;
}

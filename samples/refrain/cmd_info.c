/* samples/refrain/cmd_info.c - `refrain info`: what a model folder or a safetensors file holds, without loading it.
 *
 * Only headers and configs are read, so a model larger than memory can be looked at. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/weights.h"
#include "dit/config.h"
#include "dit/sampler.h"
#include "dit/world.h"
#include "dlm/model.h"
#include "samples/refrain/args.h"
#include "samples/refrain/info_text.h"
#include "samples/refrain/info_world.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"

#define CLASSES_SHOWN 64

typedef struct {
    rf_dit_desc dit;
    rf_scheduler_config scheduler;
    weights_summary transformer, vae;
    const char *layout;
    int64_t vae_latent_channels;
    int vae_factor;
    double vae_scaling;
    rf_json *index; /* model_index.json */
} model_summary;

static bool is_float_dtype(rf_dtype dtype) {
    return dtype == RF_DTYPE_F32 || dtype == RF_DTYPE_F16 || dtype == RF_DTYPE_BF16;
}

static bool starts_with(const char *text, const char *prefix) {
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

weights_summary weights_summarize(const rf_weights *w) {
    weights_summary s = {.num_tensors = rf_weights_count(w), .bytes = rf_weights_total_bytes(w), .dtype = "none"};
    rf_dtype main_dtype = rf_weights_main_dtype(w);
    if (main_dtype != RF_DTYPE_COUNT) s.dtype = rf_dtype_name(main_dtype);
    for (size_t i = 0; i < s.num_tensors; i++) {
        const char *name = rf_weights_name(w, i);
        rf_tensor t;
        if (rf_weights_get(w, name, &t, NULL) != RF_OK || !is_float_dtype(t.dtype)) continue;
        int64_t num = rf_tensor_num_elems(&t);
        s.num_params += num;
        if (starts_with(name, "encoder.") || starts_with(name, "quant_conv.")) continue;
        s.num_decoder_params += num;
    }
    return s;
}

static const char *layout_of(const rf_weights *w) {
    for (size_t i = 0; i < rf_weights_count(w); i++) {
        const char *name = rf_weights_name(w, i);
        if (starts_with(name, "transformer_blocks.")) return "diffusers";
        if (starts_with(name, "blocks.")) return "original";
    }
    return "unknown";
}

/* Opens dir/part/file. */
static rf_status open_config(rf_json **out, const char *dir, const char *part, const char *file, rf_error *err) {
    char *folder = rf_path_join(dir, part);
    char *path = folder ? rf_path_join(folder, file) : NULL;
    rf_status st = path ? rf_json_open(out, path, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", dir);
    rf_free(path);
    rf_free(folder);
    return st;
}

static rf_status open_part_weights(rf_weights **out, const char *dir, const char *part, rf_error *err) {
    char *folder = rf_path_join(dir, part);
    rf_status st =
        folder ? rf_weights_open(out, folder, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", dir);
    rf_free(folder);
    return st;
}

static rf_status read_transformer(model_summary *m, const char *dir, rf_error *err) {
    rf_json *config = NULL;
    rf_weights *weights = NULL;
    rf_status st = open_config(&config, dir, "transformer", "config.json", err);
    if (st == RF_OK) st = rf_dit_config_read(&m->dit, config, err);
    if (st == RF_OK) st = open_part_weights(&weights, dir, "transformer", err);
    if (st == RF_OK) {
        m->transformer = weights_summarize(weights);
        m->layout = layout_of(weights);
    }
    rf_weights_close(weights);
    rf_json_close(config);
    return st;
}

static rf_status read_vae(model_summary *m, const char *dir, rf_error *err) {
    rf_json *config = NULL;
    rf_weights *weights = NULL;
    rf_status st = open_config(&config, dir, "vae", "config.json", err);
    if (st != RF_OK) return st;
    const rf_json_value *root = rf_json_root(config);
    size_t num_levels = rf_json_count(rf_json_get(root, "block_out_channels"));
    if (num_levels < 1 || num_levels > 16) {
        st = rf_fail(err, RF_ERR_CONFIG, "%s: block_out_channels has %zu levels, expected 1..16", rf_json_name(config),
                     num_levels);
    }
    m->vae_factor = st == RF_OK ? 1 << (num_levels - 1) : 1;
    if (st == RF_OK) st = rf_json_opt_int(config, root, "latent_channels", 1, 4096, 4, &m->vae_latent_channels, err);
    if (st == RF_OK) st = rf_json_opt_double(config, root, "scaling_factor", 1e-9, 1e9, 0.18215, &m->vae_scaling, err);
    if (st == RF_OK) st = open_part_weights(&weights, dir, "vae", err);
    if (st == RF_OK) m->vae = weights_summarize(weights);
    rf_weights_close(weights);
    rf_json_close(config);
    return st;
}

static rf_status read_model(model_summary *m, const char *dir, rf_error *err) {
    rf_json *scheduler = NULL;
    char *index_path = rf_path_join(dir, "model_index.json");
    rf_status st =
        index_path ? rf_json_open(&m->index, index_path, err) : rf_fail(err, RF_ERR_MEMORY, "no memory for a path");
    rf_free(index_path);
    if (st == RF_OK) st = open_config(&scheduler, dir, "scheduler", "scheduler_config.json", err);
    if (st == RF_OK) st = rf_scheduler_config_read(&m->scheduler, scheduler, err);
    rf_json_close(scheduler);
    if (st == RF_OK) st = read_transformer(m, dir, err);
    if (st == RF_OK) st = read_vae(m, dir, err);
    return st;
}

static const char *prediction_name(rf_prediction p) {
    switch (p) {
    case RF_PREDICTION_EPSILON: return "epsilon";
    case RF_PREDICTION_V: return "v";
    case RF_PREDICTION_SAMPLE: return "sample";
    case RF_PREDICTION_FLOW: return "flow";
    }
    return "unknown";
}

/* Device memory of the weights that sampling loads: transformer and decoder. */
static double weight_bytes(const model_summary *m, rf_dtype dtype) {
    return (double)(m->transformer.num_params + m->vae.num_decoder_params) * (double)rf_dtype_bytes(dtype);
}

/* First entry of id2label in model_index.json, in file order; NULL if there is none. */
static const rf_json_value *first_class(const model_summary *m) {
    const rf_json_value *labels = rf_json_get(rf_json_root(m->index), "id2label");
    return labels && rf_json_is_object(labels) ? labels->child : NULL;
}

static void print_model(const model_summary *m, const char *dir) {
    const rf_dit_desc *d = &m->dit;
    char f32[32], bf16[32];
    format_bytes(f32, sizeof f32, weight_bytes(m, RF_DTYPE_F32));
    format_bytes(bf16, sizeof bf16, weight_bytes(m, RF_DTYPE_BF16));
    printf("model        %s\n", dir);
    printf("family       %s, %s layout\n", d->family, m->layout);
    printf("transformer  %.2f M parameters in %s (%zu tensors): %d blocks, width %" PRId64
           ", %d heads of %d, patch %d\n",
           (double)m->transformer.num_params / 1e6, m->transformer.dtype, m->transformer.num_tensors,
           rf_dit_desc_num_blocks(d), d->width, d->num_heads, d->head_dim, d->ph);
    printf("vae          %.2f M parameters in %s (decoder %.2f M): %dx, %" PRId64 " latent channels, scaling %g\n",
           (double)m->vae.num_params / 1e6, m->vae.dtype, (double)m->vae.num_decoder_params / 1e6, m->vae_factor,
           m->vae_latent_channels, m->vae_scaling);
    printf("pictures     %" PRId64 "x%" PRId64 " (latent %" PRId64 "x%" PRId64 ")\n", d->sample_size * m->vae_factor,
           d->sample_size * m->vae_factor, d->sample_size, d->sample_size);
    printf("scheduler    %s, %s prediction, %d training steps\n", rf_sampler_kind_name(m->scheduler.kind),
           prediction_name(m->scheduler.prediction), m->scheduler.num_train_timesteps);
    printf("weights      %s in f32, %s in bf16\n", f32, bf16);
    printf("classes      %d\n", d->num_classes);
    int shown = 0;
    for (const rf_json_value *c = first_class(m); c && shown < CLASSES_SHOWN; c = c->next, shown++) {
        printf("  ");
        print_clean(c->string);
        printf("\t");
        print_clean(rf_json_string(c) ? rf_json_string(c) : "(not a name)");
        putchar('\n');
    }
    if (d->num_classes > CLASSES_SHOWN) printf("  ...  (--json lists all)\n");
}

cJSON *weights_summary_json(const weights_summary *w) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "dtype", w->dtype);
    report_add_uint(o, "tensors", w->num_tensors);
    report_add_uint(o, "parameters", (uint64_t)w->num_params);
    report_add_uint(o, "file_bytes", w->bytes);
    return o;
}

static rf_status print_model_json(const model_summary *m, const char *dir, rf_error *err) {
    const rf_dit_desc *d = &m->dit;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "info");
    cJSON_AddStringToObject(root, "model", dir);
    cJSON_AddStringToObject(root, "family", d->family);
    cJSON_AddStringToObject(root, "layout", m->layout);
    cJSON *transformer = weights_summary_json(&m->transformer);
    cJSON_AddNumberToObject(transformer, "blocks", rf_dit_desc_num_blocks(d));
    cJSON_AddNumberToObject(transformer, "width", (double)d->width);
    cJSON_AddNumberToObject(transformer, "heads", d->num_heads);
    cJSON_AddNumberToObject(transformer, "head_dim", d->head_dim);
    cJSON_AddNumberToObject(transformer, "patch", d->ph);
    cJSON_AddNumberToObject(transformer, "sample_size", (double)d->sample_size);
    cJSON_AddItemToObject(root, "transformer", transformer);
    cJSON *vae = weights_summary_json(&m->vae);
    report_add_uint(vae, "decoder_parameters", (uint64_t)m->vae.num_decoder_params);
    cJSON_AddNumberToObject(vae, "factor", m->vae_factor);
    cJSON_AddNumberToObject(vae, "latent_channels", (double)m->vae_latent_channels);
    cJSON_AddNumberToObject(vae, "scaling_factor", m->vae_scaling);
    cJSON_AddItemToObject(root, "vae", vae);
    cJSON *scheduler = cJSON_AddObjectToObject(root, "scheduler");
    cJSON_AddStringToObject(scheduler, "sampling_method", rf_sampler_kind_name(m->scheduler.kind));
    cJSON_AddStringToObject(scheduler, "prediction", prediction_name(m->scheduler.prediction));
    cJSON_AddNumberToObject(scheduler, "train_steps", m->scheduler.num_train_timesteps);
    cJSON_AddNumberToObject(root, "width", (double)(d->sample_size * m->vae_factor));
    cJSON_AddNumberToObject(root, "height", (double)(d->sample_size * m->vae_factor));
    cJSON *memory = cJSON_AddObjectToObject(root, "memory");
    cJSON_AddNumberToObject(memory, "weights_f32_bytes", weight_bytes(m, RF_DTYPE_F32));
    cJSON_AddNumberToObject(memory, "weights_bf16_bytes", weight_bytes(m, RF_DTYPE_BF16));
    cJSON_AddNumberToObject(root, "num_classes", d->num_classes);
    cJSON *classes = cJSON_AddObjectToObject(root, "classes");
    for (const rf_json_value *c = first_class(m); c; c = c->next) {
        if (rf_json_string(c)) cJSON_AddItemToObject(classes, c->string, cJSON_CreateString(rf_json_string(c)));
    }
    return report_print_json(root, err);
}

static void format_shape(char *out, size_t out_bytes, const rf_tensor *t) {
    size_t used = (size_t)snprintf(out, out_bytes, "[");
    for (int i = 0; i < t->rank; i++) {
        used += (size_t)snprintf(out + used, out_bytes - used, "%s%" PRId64, i ? ", " : "", t->shape[i]);
    }
    snprintf(out + used, out_bytes - used, "]");
}

static rf_status print_weights(const rf_weights *w, const char *path, bool json, rf_error *err) {
    weights_summary s = weights_summarize(w);
    cJSON *root = NULL, *list = NULL;
    if (json) {
        root = weights_summary_json(&s);
        cJSON_AddStringToObject(root, "command", "info");
        cJSON_AddStringToObject(root, "file", path);
        list = cJSON_AddArrayToObject(root, "list");
    } else {
        char bytes[32];
        format_bytes(bytes, sizeof bytes, (double)s.bytes);
        printf("file     %s\ntensors  %zu, %.2f M parameters, %s, mostly %s\n", path, s.num_tensors,
               (double)s.num_params / 1e6, bytes, s.dtype);
    }
    for (size_t i = 0; i < s.num_tensors; i++) {
        const char *name = rf_weights_name(w, i);
        rf_tensor t;
        rf_error why = {0};
        char shape[160] = "";
        bool readable = rf_weights_get(w, name, &t, &why) == RF_OK;
        if (readable) format_shape(shape, sizeof shape, &t);
        if (json) {
            cJSON *o = cJSON_CreateObject();
            cJSON_AddStringToObject(o, "name", name);
            cJSON_AddStringToObject(o, "dtype", readable ? rf_dtype_name(t.dtype) : "unreadable");
            cJSON_AddStringToObject(o, "shape", shape);
            cJSON_AddItemToArray(list, o);
        } else if (readable) {
            printf("  %-4s %-24s ", rf_dtype_name(t.dtype), shape);
            print_clean(name);
            putchar('\n');
        } else {
            printf("  not readable: ");
            print_clean(why.message);
            putchar('\n');
        }
    }
    return json ? report_print_json(root, err) : RF_OK;
}

int cmd_info(int argc, char **argv) {
    bool json = false;
    const char *model_option = NULL;
    const arg_option options[] = {
        arg_string("model", 'm', "DIR", "the same as MODEL (default: none)", &model_option),
        arg_flag("json", 0, "one JSON object (default: plain text)", &json),
    };
    const arg_spec spec = {
        .command = "refrain info",
        .usage = "[MODEL] [options]",
        .about = "Says what a model folder, a shipped model or a safetensors file holds: family, sizes, classes or "
                 "actions or tokens, parameters, memory. For a file it lists the tensors.",
        .options = options,
        .num_options = sizeof options / sizeof options[0],
        .max_positional = 1,
        .positional_name = "a model folder or a safetensors file"};
    const char *name = NULL;
    args_result parsed = args_parse(&spec, argc, argv, &name, NULL);
    if (parsed != ARGS_OK) return parsed == ARGS_HELP ? EXIT_OK : EXIT_USAGE;
    if (!name == !model_option) {
        say_error(name ? "MODEL and --model exclude each other"
                       : "refrain info: expected a model folder or a safetensors file, found nothing");
        return EXIT_USAGE;
    }
    if (!name) name = model_option;

    rf_error err = {0};
    char *path = NULL;
    model_summary model = {0};
    rf_weights *weights = NULL;
    rf_status st = find_model(&path, name, &err);
    char *index = st == RF_OK ? rf_path_join(path, "model_index.json") : NULL;
    if (st == RF_OK && rf_path_is_dir(path) && rf_world_is_world(path)) {
        st = info_world(path, json, &err);
    } else if (st == RF_OK && rf_path_is_dir(path) && rf_text_is_text(path)) {
        st = info_text(path, json, &err);
    } else if (st == RF_OK && rf_path_is_dir(path) && index && rf_path_exists(index)) {
        st = read_model(&model, path, &err);
        if (st == RF_OK && json) {
            st = print_model_json(&model, path, &err);
        } else if (st == RF_OK) {
            print_model(&model, path);
        }
    } else if (st == RF_OK) {
        st = rf_weights_open(&weights, path, &err);
        if (st == RF_OK) st = print_weights(weights, path, json, &err);
    }
    rf_weights_close(weights);
    rf_json_close(model.index);
    rf_free(index);
    rf_free(path);
    return st == RF_OK ? EXIT_OK : fail_with(&err);
}

/* dlm/kv_tables.c - kv.json and retention gates: read, and checked against the model. */
#include "dlm/kv_tables.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/weights.h"

void rf_kv_tables_close(rf_kv_tables *t) {
    for (int l = 0; t->gates != NULL && l < t->num_layers; l++) {
        for (int p = 0; p < RF_KV_GATE_PARTS; p++) {
            rf_free(t->gates[l].weight[p]);
            rf_free(t->gates[l].bias[p]);
        }
    }
    rf_free(t->gates);
    rf_free(t->layer_shares);
    rf_free(t->head_list);
    rf_free(t->head_classes);
    *t = (rf_kv_tables){0};
}

/* --- kv.json -------------------------------------------------------------------------------------------------------------- */

static rf_status find_table(const rf_json_value **out, const rf_json *doc, const char *name, const rf_text_desc *d,
                            rf_error *err) {
    const rf_json_value *table = rf_json_get(rf_json_root(doc), name);
    int64_t layers, heads;
    if (table == NULL || !rf_json_is_object(table))
        return rf_fail(err, RF_ERR_MISSING, "%s: no table %s (`refrain calibrate --kv` measures it)", rf_json_name(doc),
                       name);
    RF_TRY(rf_json_get_int(doc, table, "num_layers", 1, 1 << 20, &layers, err));
    RF_TRY(rf_json_get_int(doc, table, "num_q_heads", 1, 1 << 20, &heads, err));
    if (layers != d->num_layers || heads != d->num_q_heads)
        return rf_fail(err, RF_ERR_CONFIG, "%s: %s is of %lld layers of %lld query heads, the model has %d of %d",
                       rf_json_name(doc), name, (long long)layers, (long long)heads, d->num_layers, d->num_q_heads);
    *out = table;
    return RF_OK;
}

/* Lists of heads, one a layer, to flags [L][Hq]. */
static rf_status read_heads(uint8_t **out, const rf_json *doc, const char *name, const rf_text_desc *d, rf_error *err) {
    const rf_json_value *table, *list;
    RF_TRY(find_table(&table, doc, name, d, err));
    const rf_json_value *rows = rf_json_get(table, "heads");
    if (rows == NULL || !rf_json_is_array(rows) || rf_json_count(rows) != (size_t)d->num_layers)
        return rf_fail(err, RF_ERR_CONFIG, "%s: %s.heads: expected %d lists", rf_json_name(doc), name, d->num_layers);
    uint8_t *flags = rf_alloc_zero((size_t)d->num_layers, (size_t)d->num_q_heads);
    if (flags == NULL) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a table", rf_json_name(doc));
    rf_status st = RF_OK;
    int layer = 0;
    for (list = rf_json_first(rows); list != NULL && st == RF_OK; list = rf_json_next(list), layer++) {
        if (!rf_json_is_array(list))
            st = rf_fail(err, RF_ERR_CONFIG, "%s: %s.heads[%d]: expected a list", rf_json_name(doc), name, layer);
        const rf_json_value *v = st == RF_OK ? rf_json_first(list) : NULL;
        for (; v != NULL && st == RF_OK; v = rf_json_next(v)) {
            double head = rf_json_number(v);
            if (head >= 0 && head < d->num_q_heads && head == floor(head))
                flags[(size_t)layer * (size_t)d->num_q_heads + (size_t)head] = 1;
            else
                st = rf_fail(err, RF_ERR_CONFIG, "%s: %s.heads[%d]: expected heads 0..%d, found %g", rf_json_name(doc),
                             name, layer, d->num_q_heads - 1, head);
        }
    }
    if (st == RF_OK)
        *out = flags;
    else
        rf_free(flags);
    return st;
}

static rf_status read_shares(float **out, const rf_json *doc, const rf_text_desc *d, rf_error *err) {
    const rf_json_value *table;
    RF_TRY(find_table(&table, doc, "compresskv", d, err));
    const rf_json_value *list = rf_json_get(table, "layer_shares");
    if (list == NULL || !rf_json_is_array(list) || rf_json_count(list) != (size_t)d->num_layers)
        return rf_fail(err, RF_ERR_CONFIG, "%s: compresskv.layer_shares: expected %d numbers", rf_json_name(doc),
                       d->num_layers);
    float *shares = rf_alloc_zero((size_t)d->num_layers, sizeof *shares);
    if (shares == NULL) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a table", rf_json_name(doc));
    int layer = 0;
    for (const rf_json_value *v = rf_json_first(list); v != NULL; v = rf_json_next(v), layer++) {
        double share = rf_json_number(v);
        if (!(share >= 0 && share <= 1e30)) {
            rf_free(shares);
            return rf_fail(err, RF_ERR_CONFIG, "%s: compresskv.layer_shares[%d]: expected 0 or more, found %g",
                           rf_json_name(doc), layer, share);
        }
        shares[layer] = (float)share;
    }
    *out = shares;
    return RF_OK;
}

static rf_status read_tables(rf_kv_tables *t, const rf_kv_rule *rule, const rf_text_desc *d, const char *path,
                             rf_error *err) {
    rf_json *doc = NULL;
    RF_TRY(rf_json_open(&doc, path, err));
    rf_status st = RF_OK;
    if (rule->heads == RF_KV_HEADS_LIST) st = read_heads(&t->head_list, doc, "compresskv", d, err);
    if (st == RF_OK && rule->alloc == RF_KV_ALLOC_TABLE) st = read_shares(&t->layer_shares, doc, d, err);
    if (st == RF_OK && rule->alloc == RF_KV_ALLOC_CLASS) st = read_heads(&t->head_classes, doc, "razor", d, err);
    rf_json_close(doc);
    return st;
}

/* --- gates ---------------------------------------------------------------------------------------------------------------- */

static rf_status read_floats(float **out, const rf_weights *file, const char *name, int rank, const int64_t *shape,
                             rf_tensor *tensor, rf_error *err) {
    RF_TRY(rf_weights_get_shaped(file, name, rank, shape, tensor, err));
    if (tensor->dtype != RF_DTYPE_F32 && tensor->dtype != RF_DTYPE_F16 && tensor->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "%s: expected f32, f16 or bf16, found %s", name,
                       rf_dtype_name(tensor->dtype));
    size_t num = (size_t)tensor->shape[0] * (rank > 1 ? (size_t)tensor->shape[1] : 1);
    *out = rf_alloc(num * sizeof **out);
    if (*out == NULL) return rf_fail(err, RF_ERR_MEMORY, "no memory for %s", name);
    rf_convert(*out, RF_DTYPE_F32, tensor->data, tensor->dtype, num);
    for (size_t i = 0; i < num; i++)
        if (!isfinite((*out)[i])) return rf_fail(err, RF_ERR_CONFIG, "%s: entry %zu is not finite", name, i);
    return RF_OK;
}

static rf_status read_gate(rf_kv_gate *g, const rf_weights *file, const rf_text_desc *d, int layer, rf_error *err) {
    char name[64];
    snprintf(name, sizeof name, "layers.%d.fc3.weight", layer);
    g->num_parts = rf_weights_has(file, name) ? 3 : 2;
    int64_t in = d->hidden;
    for (int p = 0; p < g->num_parts; p++) {
        bool last = p + 1 == g->num_parts;
        rf_tensor tensor;
        int64_t shape[2] = {last ? d->num_kv_heads : -1, in};
        snprintf(name, sizeof name, "layers.%d.fc%d.weight", layer, p + 1);
        RF_TRY(read_floats(&g->weight[p], file, name, 2, shape, &tensor, err));
        if (tensor.shape[0] < 1 || tensor.shape[0] > 1 << 20)
            return rf_fail(err, RF_ERR_SHAPE, "%s: %lld rows", name, (long long)tensor.shape[0]);
        int64_t rows = tensor.shape[0];
        snprintf(name, sizeof name, "layers.%d.fc%d.bias", layer, p + 1);
        RF_TRY(read_floats(&g->bias[p], file, name, 1, &rows, &tensor, err));
        g->in[p] = (int32_t)in;
        g->out[p] = (int32_t)rows;
        in = rows;
    }
    return RF_OK;
}

static rf_status read_gates(rf_kv_tables *t, const rf_text_desc *d, const char *path, rf_error *err) {
    rf_weights *file = NULL;
    t->gates = rf_alloc_zero((size_t)d->num_layers, sizeof *t->gates);
    if (t->gates == NULL) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for gates", path);
    t->num_layers = d->num_layers;
    rf_status st = rf_weights_open(&file, path, err);
    for (int l = 0; l < d->num_layers && st == RF_OK; l++) st = read_gate(&t->gates[l], file, d, l, err);
    char name[64];
    snprintf(name, sizeof name, "layers.%d.fc1.weight", d->num_layers);
    if (st == RF_OK && rf_weights_has(file, name))
        st = rf_fail(err, RF_ERR_CONFIG, "%s: has %s, the model has %d layers", path, name, d->num_layers);
    rf_weights_close(file);
    return st == RF_OK ? RF_OK : rf_fail_prefix(err, st, "%s", path);
}

int64_t rf_kv_gate_work(const rf_kv_gate *g) {
    int32_t most = 0;
    for (int p = 0; p < g->num_parts; p++) most = g->out[p] > most ? g->out[p] : most;
    return 2 * (int64_t)most;
}

void rf_kv_gate_apply(const rf_kv_gate *g, const float *x, int64_t num, float *out, float *work) {
    int64_t half = rf_kv_gate_work(g) / 2;
    for (int64_t i = 0; i < num; i++) {
        const float *in = x + i * g->in[0];
        for (int p = 0; p < g->num_parts; p++) {
            bool last = p + 1 == g->num_parts;
            float *y = last ? out + i * g->out[p] : work + (p % 2) * half;
            for (int32_t r = 0; r < g->out[p]; r++) {
                const float *w = g->weight[p] + (int64_t)r * g->in[p];
                float sum[8] = {0}, rest = 0;
                int32_t c = 0;
                for (; c + 8 <= g->in[p]; c += 8)
                    for (int k = 0; k < 8; k++) sum[k] += w[c + k] * in[c + k];
                for (; c < g->in[p]; c++) rest += w[c] * in[c];
                double v = (double)g->bias[p][r] + (double)rest;
                for (int k = 0; k < 8; k++) v += (double)sum[k];
                /* ln sigmoid v = min(v, 0) - ln(1 + e^-|v|) */
                y[r] = (float)(last ? (v < 0 ? v : 0) - log1p(exp(-fabs(v))) : v / (1 + exp(-v)));
            }
            in = y;
        }
    }
}

/* --- what a rule wants ------------------------------------------------------------------------------------------------------ */

rf_status rf_kv_tables_open(rf_kv_tables *out, const rf_kv_rule *rule, const rf_text_model *model,
                            const char *calibration, rf_error *err) {
    *out = (rf_kv_tables){0};
    bool gates = rule->score == RF_KV_SCORE_GATE;
    bool tables =
        rule->heads == RF_KV_HEADS_LIST || rule->alloc == RF_KV_ALLOC_TABLE || rule->alloc == RF_KV_ALLOC_CLASS;
    const char *name = rule->method[0] ? rule->method : "of parts";
    if (!gates && !tables) {
        if (calibration == NULL) return RF_OK;
        return rf_fail(err, RF_ERR_ARGUMENT, "KV policy %s: has no use for a calibration file, found %s", name,
                       calibration);
    }
    if (gates && tables)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "KV policy %s: gates with calibrated tables want two files", name);
    const char *file = !gates                                ? "kv.json"
                       : rule->alloc == RF_KV_ALLOC_FLAT_ALL ? "gates/retention-global.safetensors"
                                                             : "gates/retention.safetensors";
    char *path = calibration ? rf_strdup(calibration) : model->folder ? rf_path_join(model->folder, file) : NULL;
    if (path == NULL && (calibration || model->folder)) return rf_fail(err, RF_ERR_MEMORY, "no memory for a path");
    rf_status st = RF_OK;
    if (path == NULL || !rf_path_exists(path))
        st = rf_fail(err, RF_ERR_MISSING, "KV policy %s: wants %s, which is not there (%s)", name, path ? path : file,
                     gates ? "samples/train/train_gates.py makes it" : "`refrain calibrate --kv` makes it");
    if (st == RF_OK && gates) st = read_gates(out, &model->desc, path, err);
    if (st == RF_OK && tables) st = read_tables(out, rule, &model->desc, path, err);
    rf_free(path);
    if (st != RF_OK) rf_kv_tables_close(out);
    return st;
}

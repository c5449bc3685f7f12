/* samples/refrain/bench_table.c */
#include "samples/refrain/bench_table.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "samples/refrain/report.h"

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

void bench_row_set_times(bench_row *row, double *times_ms, int num_times) {
    qsort(times_ms, (size_t)num_times, sizeof *times_ms, compare_doubles);
    double sum = 0, squares = 0;
    for (int i = 0; i < num_times; i++) sum += times_ms[i];
    row->mean_ms = sum / num_times;
    for (int i = 0; i < num_times; i++) squares += (times_ms[i] - row->mean_ms) * (times_ms[i] - row->mean_ms);
    row->sd_ms = num_times > 1 ? sqrt(squares / (num_times - 1)) : 0;
    row->min_ms = times_ms[0];
    row->median_ms = 0.5 * (times_ms[(num_times - 1) / 2] + times_ms[num_times / 2]);
    row->num_runs = num_times;
}

/* A number, or "-" for one that does not apply. */
static void cell(char out[24], int decimals, double value) {
    if (value > 0) {
        snprintf(out, 24, "%.*f", decimals, value);
    } else {
        snprintf(out, 24, "-");
    }
}

static void print_md(const bench_row *rows, int num_rows) {
    printf("| model | params | device | dtype | what | batch | size | median ms | mean ± sd | min | TFLOP/s | img/s | "
           "floor ms |\n");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        char what[64], rate[24], images[24], least[24];
        snprintf(what, sizeof what, "%s", r->what);
        if (r->num_steps > 0) snprintf(what, sizeof what, "%s, %d steps", r->what, r->num_steps);
        cell(rate, r->tflops < 10 ? 3 : 1, r->tflops);
        cell(images, 2, r->images_per_s);
        cell(least, 3, r->floor_ms);
        printf("| %s | %.1f M | %s | %s | %s | %d | %s | %.3f | %.3f ± %.3f | %.3f | %s | %s | %s |\n", r->model,
               (double)r->num_params / 1e6, r->device, r->dtype, what, r->batch, r->size, r->median_ms, r->mean_ms,
               r->sd_ms, r->min_ms, rate, images, least);
    }
}

static void print_world_md(const bench_row *rows, int num_rows) {
    printf("| model | params | device | dtype | what | steps | batch | size | median ms | mean ± sd | min | TFLOP/s | "
           "frames/s | floor ms | arena MB | graph nodes |\n");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        char rate[24], frames[24], least[24], nodes[24];
        cell(rate, r->tflops < 10 ? 3 : 1, r->tflops);
        cell(frames, 2, r->frames_per_s);
        cell(least, 3, r->floor_ms);
        cell(nodes, 0, r->graph_nodes);
        printf("| %s | %.1f M | %s | %s | %s | %d | %d | %s | %.3f | %.3f ± %.3f | %.3f | %s | %s | %s | %.1f | %s |\n",
               r->model, (double)r->num_params / 1e6, r->device, r->dtype, r->what, r->num_steps, r->batch, r->size,
               r->median_ms, r->mean_ms, r->sd_ms, r->min_ms, rate, frames, least, (double)r->arena_bytes / 1e6, nodes);
    }
}

static void print_text_md(const bench_row *rows, int num_rows) {
    printf(
        "| model | params | device | dtype | what | batch | rows | kept | head | median ms | mean ± sd | min | GB/s of "
        "weights | TFLOP/s | floor ms | arena MB | graph nodes |\n");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        char rate[24], speed[24], least[24], nodes[24];
        cell(speed, r->gbytes_per_s < 10 ? 3 : 0, r->gbytes_per_s);
        cell(rate, r->tflops < 10 ? 3 : 1, r->tflops);
        cell(least, 3, r->floor_ms);
        cell(nodes, 0, r->graph_nodes);
        printf("| %s | %.1f M | %s | %s | %s | %d | %d | %d | %d | %.3f | %.3f ± %.3f | %.3f | %s | %s | %s | %.1f | "
               "%s |\n",
               r->model, (double)r->num_params / 1e6, r->device, r->dtype, r->what, r->batch, r->num_rows, r->kept,
               r->head_rows, r->median_ms, r->mean_ms, r->sd_ms, r->min_ms, speed, rate, least,
               (double)r->arena_bytes / 1e6, nodes);
    }
}

/* The wait for scoring as a share of the rest of the prefill. */
static double score_share(const bench_row *r) {
    double rest = r->prefill_ms - r->score_wait_ms;
    return rest > 0 ? r->score_wait_ms / rest : 0;
}

/* How much longer the prefill is than that of no policy, as a share of it. */
static double over_none(const bench_row *r) {
    return r->none_prefill_ms > 0 ? r->prefill_ms / r->none_prefill_ms - 1 : 0;
}

static void print_kv_md(const bench_row *rows, int num_rows) {
    printf("| model | params | device | dtype | policy | budget | prompt | batch | step: median ms | mean ± sd | min | "
           "scoring a step ms | prefill ms | over none %% | scoring ms | waited for ms | of prefill %% | kept MB | "
           "full MB | "
           "session MB | graph nodes |\n");
    printf("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        char budget[24], nodes[24], over[24] = "-";
        cell(budget, 0, r->budget);
        cell(nodes, 0, r->graph_nodes);
        if (r->none_prefill_ms > 0) snprintf(over, sizeof over, "%+.2f", 100 * over_none(r));
        printf("| %s | %.1f M | %s | %s | %s | %s | %d | %d | %.3f | %.3f ± %.3f | %.3f | %.3f | %.1f | %s | %.2f | "
               "%.2f | "
               "%.2f | %.1f | %.1f | %.1f | %s |\n",
               r->model, (double)r->num_params / 1e6, r->device, r->dtype, r->policy, budget, r->kept, r->batch,
               r->median_ms, r->mean_ms, r->sd_ms, r->min_ms, r->step_score_ms, r->prefill_ms, over, r->score_ms,
               r->score_wait_ms, 100 * score_share(r), r->kept_bytes / 1e6, r->full_bytes / 1e6,
               (double)r->arena_bytes / 1e6, nodes);
    }
}

/* A field in quotes where it needs them. */
static void print_csv_text(const char *text) {
    putchar('"');
    for (const char *c = text; *c; c++) {
        if (*c == '"') putchar('"');
        putchar(*c);
    }
    printf("\",");
}

static void print_csv(const bench_row *rows, int num_rows) {
    printf("model,params,device,dtype,what,steps,batch,size,runs,median_ms,mean_ms,sd_ms,min_ms,tflops,images_per_s,"
           "floor_ms\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        print_csv_text(r->model);
        printf("%" PRId64 ",", r->num_params);
        print_csv_text(r->device);
        printf("%s,%s,%d,%d,%s,%d,%.6f,%.6f,%.6f,%.6f,%.4f,", r->dtype, r->what, r->num_steps, r->batch, r->size,
               r->num_runs, r->median_ms, r->mean_ms, r->sd_ms, r->min_ms, r->tflops);
        if (r->images_per_s > 0) printf("%.4f", r->images_per_s);
        putchar(',');
        if (r->floor_ms > 0) printf("%.6f", r->floor_ms);
        putchar('\n');
    }
}

static void print_csv_number(double value, int decimals) {
    if (value > 0) printf("%.*f", decimals, value);
    putchar(',');
}

static void print_world_csv(const bench_row *rows, int num_rows) {
    printf("model,params,device,dtype,what,steps,batch,size,kept,frames,runs,median_ms,mean_ms,sd_ms,min_ms,tflops,"
           "frames_per_s,floor_ms,graph_nodes,arena_bytes\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        print_csv_text(r->model);
        printf("%" PRId64 ",", r->num_params);
        print_csv_text(r->device);
        printf("%s,", r->dtype);
        print_csv_text(r->what);
        printf("%d,%d,%s,", r->num_steps, r->batch, r->size);
        print_csv_number(r->kept, 0);
        print_csv_number(r->frames, 0);
        printf("%d,%.6f,%.6f,%.6f,%.6f,", r->num_runs, r->median_ms, r->mean_ms, r->sd_ms, r->min_ms);
        print_csv_number(r->tflops, 4);
        print_csv_number(r->frames_per_s, 4);
        print_csv_number(r->floor_ms, 6);
        print_csv_number(r->graph_nodes, 0);
        printf("%zu\n", r->arena_bytes);
    }
}

static void print_text_csv(const bench_row *rows, int num_rows) {
    printf("model,params,device,dtype,what,batch,rows,kept,head_rows,runs,median_ms,mean_ms,sd_ms,min_ms,gbytes_per_s,"
           "tflops,floor_ms,graph_nodes,arena_bytes\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        print_csv_text(r->model);
        printf("%" PRId64 ",", r->num_params);
        print_csv_text(r->device);
        printf("%s,", r->dtype);
        print_csv_text(r->what);
        printf("%d,%d,%d,%d,%d,%.6f,%.6f,%.6f,%.6f,", r->batch, r->num_rows, r->kept, r->head_rows, r->num_runs,
               r->median_ms, r->mean_ms, r->sd_ms, r->min_ms);
        print_csv_number(r->gbytes_per_s, 4);
        print_csv_number(r->tflops, 4);
        print_csv_number(r->floor_ms, 6);
        print_csv_number(r->graph_nodes, 0);
        printf("%zu\n", r->arena_bytes);
    }
}

static void print_kv_csv(const bench_row *rows, int num_rows) {
    printf("model,params,device,dtype,policy,budget,prompt,batch,runs,median_ms,mean_ms,sd_ms,min_ms,step_score_ms,"
           "prefill_ms,none_prefill_ms,score_ms,score_wait_ms,kept_bytes,full_bytes,evictions,session_bytes,graph_nodes"
           "\n");
    for (int i = 0; i < num_rows; i++) {
        const bench_row *r = &rows[i];
        print_csv_text(r->model);
        printf("%" PRId64 ",", r->num_params);
        print_csv_text(r->device);
        printf("%s,", r->dtype);
        print_csv_text(r->policy);
        printf("%d,%d,%d,%d,%.6f,%.6f,%.6f,%.6f,%.6f,%.6f,", r->budget, r->kept, r->batch, r->num_runs, r->median_ms,
               r->mean_ms, r->sd_ms, r->min_ms, r->step_score_ms, r->prefill_ms);
        print_csv_number(r->none_prefill_ms, 6);
        printf("%.6f,%.6f,%.0f,%.0f,%.0f,%zu,%d\n", r->score_ms, r->score_wait_ms, r->kept_bytes, r->full_bytes,
               r->evictions, r->arena_bytes, r->graph_nodes);
    }
}

static void add_kv_json(cJSON *o, const bench_row *r) {
    cJSON_AddStringToObject(o, "policy", r->policy);
    cJSON_AddItemToObject(o, "budget", r->budget > 0 ? cJSON_CreateNumber(r->budget) : cJSON_CreateNull());
    cJSON_AddNumberToObject(o, "prompt", r->kept);
    cJSON_AddNumberToObject(o, "step_score_ms", r->step_score_ms);
    cJSON_AddNumberToObject(o, "prefill_ms", r->prefill_ms);
    cJSON_AddNumberToObject(o, "score_ms", r->score_ms);
    cJSON_AddNumberToObject(o, "score_wait_ms", r->score_wait_ms);
    cJSON_AddNumberToObject(o, "score_share", score_share(r));
    if (r->none_prefill_ms > 0) cJSON_AddNumberToObject(o, "over_none", over_none(r));
    cJSON_AddNumberToObject(o, "kept_bytes", r->kept_bytes);
    cJSON_AddNumberToObject(o, "full_bytes", r->full_bytes);
    cJSON_AddNumberToObject(o, "evictions", r->evictions);
    report_add_uint(o, "session_bytes", r->arena_bytes);
    if (r->graph_nodes > 0) cJSON_AddNumberToObject(o, "graph_nodes", r->graph_nodes);
}

static void add_text_json(cJSON *o, const bench_row *r) {
    cJSON_AddNumberToObject(o, "rows", r->num_rows);
    cJSON_AddNumberToObject(o, "kept", r->kept);
    cJSON_AddNumberToObject(o, "head_rows", r->head_rows);
    cJSON_AddNumberToObject(o, "gbytes_per_s", r->gbytes_per_s);
    if (r->graph_nodes > 0) cJSON_AddNumberToObject(o, "graph_nodes", r->graph_nodes);
    report_add_uint(o, "arena_bytes", r->arena_bytes);
}

static void add_world_json(cJSON *o, const bench_row *r) {
    if (r->kept > 0) cJSON_AddNumberToObject(o, "kept", r->kept);
    if (r->frames > 0) cJSON_AddNumberToObject(o, "frames", r->frames);
    if (r->frames_per_s > 0) cJSON_AddNumberToObject(o, "frames_per_s", r->frames_per_s);
    if (r->graph_nodes > 0) cJSON_AddNumberToObject(o, "graph_nodes", r->graph_nodes);
    report_add_uint(o, "arena_bytes", r->arena_bytes);
}

static cJSON *row_json(const bench_row *r) {
    cJSON *o = cJSON_CreateObject();
    cJSON_AddStringToObject(o, "model", r->model);
    cJSON_AddNumberToObject(o, "params", (double)r->num_params);
    cJSON_AddStringToObject(o, "device", r->device);
    cJSON_AddStringToObject(o, "dtype", r->dtype);
    cJSON_AddStringToObject(o, "what", r->what);
    if (r->num_steps > 0) cJSON_AddNumberToObject(o, "steps", r->num_steps);
    cJSON_AddNumberToObject(o, "batch", r->batch);
    if (r->size) cJSON_AddStringToObject(o, "size", r->size);
    cJSON_AddNumberToObject(o, "runs", r->num_runs);
    cJSON_AddNumberToObject(o, "median_ms", r->median_ms);
    cJSON_AddNumberToObject(o, "mean_ms", r->mean_ms);
    cJSON_AddNumberToObject(o, "sd_ms", r->sd_ms);
    cJSON_AddNumberToObject(o, "min_ms", r->min_ms);
    if ((!r->world && !r->kv) || r->tflops > 0) cJSON_AddNumberToObject(o, "tflops", r->tflops);
    if (r->images_per_s > 0) cJSON_AddNumberToObject(o, "images_per_s", r->images_per_s);
    if (r->floor_ms > 0) cJSON_AddNumberToObject(o, "floor_ms", r->floor_ms);
    if (r->world) add_world_json(o, r);
    if (r->text) add_text_json(o, r);
    if (r->kv) add_kv_json(o, r);
    return o;
}

static rf_status print_jsonl(const bench_row *rows, int num_rows, rf_error *err) {
    for (int i = 0; i < num_rows; i++) {
        cJSON *o = row_json(&rows[i]);
        char *text = cJSON_PrintUnformatted(o);
        cJSON_Delete(o);
        if (!text) return rf_fail(err, RF_ERR_MEMORY, "no memory for the JSON output");
        puts(text);
        cJSON_free(text);
    }
    return RF_OK;
}

static rf_status print_json(const bench_row *rows, int num_rows, rf_error *err) {
    cJSON *root = cJSON_CreateArray();
    for (int i = 0; i < num_rows; i++) cJSON_AddItemToArray(root, row_json(&rows[i]));
    return report_print_json(root, err);
}

rf_status bench_print(const bench_row *rows, int num_rows, bench_format format, rf_error *err) {
    bool world = num_rows > 0 && rows[0].world, text = num_rows > 0 && rows[0].text, kv = num_rows > 0 && rows[0].kv;
    switch (format) {
    case BENCH_MD:
        if (kv) {
            print_kv_md(rows, num_rows);
        } else if (text) {
            print_text_md(rows, num_rows);
        } else if (world) {
            print_world_md(rows, num_rows);
        } else {
            print_md(rows, num_rows);
        }
        return RF_OK;
    case BENCH_CSV:
        if (kv) {
            print_kv_csv(rows, num_rows);
        } else if (text) {
            print_text_csv(rows, num_rows);
        } else if (world) {
            print_world_csv(rows, num_rows);
        } else {
            print_csv(rows, num_rows);
        }
        return RF_OK;
    case BENCH_JSON: return print_json(rows, num_rows, err);
    case BENCH_JSONL: return print_jsonl(rows, num_rows, err);
    }
    return rf_fail(err, RF_ERR_ARGUMENT, "unknown output format %d", (int)format);
}

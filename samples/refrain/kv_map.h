/* samples/refrain/kv_map.h - a picture of what a KV policy keeps: a row for each layer and key head, positions to the right.
 *
 * Where there are more positions than columns a column is the share kept of those that fall into it. The strip below is the mean over
 * all rows; a line marks where the prompt ends. */
#ifndef REFRAIN_KV_MAP_H
#define REFRAIN_KV_MAP_H

#include "core/image.h"
#include "samples/refrain/text_model.h"

typedef struct {
    int num_layers, num_heads;
    int32_t num_prompt, num_positions; /* prompt and what was fed after it */
    uint8_t *kept;                     /* [layers][heads][positions] 0, 1; own */
    const char *model, *policy;        /* borrowed */
    int32_t budget;                    /* 0 = none */
} kv_map;

/* What the last run of the decoder has left. num_made: tokens it made, the last of which was not fed. */
rf_status kv_map_read(kv_map *out, rf_decoder *decoder, const opened_text *text, int32_t num_prompt, int32_t num_made,
                      rf_error *err);
rf_status kv_map_draw(rf_image *out, const kv_map *map, rf_error *err);
/* A PNG with the settings in its texts. */
rf_status kv_map_save(const kv_map *map, const char *path, rf_error *err);
void kv_map_free(kv_map *map);

#endif

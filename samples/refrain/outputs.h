/* samples/refrain/outputs.h - names of picture files, checked before a long run, and the labelled contact sheet. */
#ifndef REFRAIN_OUTPUTS_H
#define REFRAIN_OUTPUTS_H

#include "core/image.h"

/* Name of picture `index` of `num_images`: a %d or %03d in the pattern takes the index ("%%" is a percent sign); with no such
 * place, one picture gets the pattern as it is and several get "_000" before the extension. rf_free. RF_ERR_ARGUMENT says
 * what is wrong with the pattern. */
rf_status output_name(char **out, const char *pattern, int index, int num_images, rf_error *err);

/* Can a file of this name be written here? Nothing is left behind and an existing file stays as it is. */
rf_status output_check(const char *path, rf_error *err);

/* A sheet of num_images pictures of width x height with a label under each; small pictures are enlarged by whole pixels so
 * that labels stay readable. */
typedef struct {
    rf_image image;
    int columns, rows;
    int zoom;                    /* sheet pixels per picture pixel */
    int cell_width, cell_height; /* sheet pixels, label and margin included */
    int text_scale;
} contact_sheet;

rf_status contact_sheet_create(contact_sheet *out, int num_images, int width, int height, rf_error *err);
/* Puts picture `index` (of the size given at creation) in its place and writes the label, cut to fit. */
rf_status contact_sheet_place(contact_sheet *sheet, int index, const rf_image *picture, const char *label,
                              rf_error *err);
void contact_sheet_free(contact_sheet *sheet);

#endif

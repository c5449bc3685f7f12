/* samples/hello_image.c - the library in one page: a class in, a picture out.
 *
 *     build/hello_image samples/models/objects sphere-blue hello.png */
#include <stdio.h>

#include "core/image.h"
#include "core/memory.h"
#include "dit/pipeline.h"

int main(int argc, char **argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: hello_image MODEL CLASS OUT.png\n");
        return 2;
    }
    rf_error err = {0};
    rf_backend *backend = NULL;       /* a device, shared */
    rf_image_model *model = NULL;     /* weights, read-only, shared */
    rf_image_session *session = NULL; /* memory and plan for one batch shape */
    rf_image_options options = rf_image_options_default();
    rf_image image = {0};
    float *pixels = NULL;
    int class_id = 0;
    const uint64_t seed = 7;

    rf_status st = rf_backend_open(&backend, "cpu", 0, &err);
    if (st == RF_OK) st = rf_image_model_load(&model, backend, argv[1], RF_DTYPE_F32, &err);
    if (st == RF_OK) st = rf_image_model_find_class(model, argv[2], &class_id, &err);
    options.num_steps = 20;
    if (st == RF_OK) st = rf_image_session_create(&session, model, &options, &err);
    if (st == RF_OK) {
        rf_image_session_info info = rf_image_session_get_info(session);
        pixels = rf_alloc_zero((size_t)info.image_width * (size_t)info.image_height, 3 * sizeof *pixels);
        if (!pixels) st = rf_fail(&err, RF_ERR_MEMORY, "no memory for the picture");
        if (st == RF_OK) st = rf_image_session_denoise(session, &class_id, &seed, NULL, NULL, NULL, &err);
        if (st == RF_OK) st = rf_image_session_decode(session, pixels, &err);
        if (st == RF_OK) st = rf_image_from_planar(&image, pixels, info.image_width, info.image_height, &err);
        if (st == RF_OK) st = rf_image_save_png(&image, argv[3], NULL, 0, &err);
    }
    if (st != RF_OK) fprintf(stderr, "hello_image: %s\n", err.message);

    rf_image_free(&image); /* every close takes NULL, so one way out serves all */
    rf_free(pixels);
    rf_image_session_destroy(session);
    rf_image_model_close(model);
    rf_backend_close(backend);
    return st == RF_OK ? 0 : 1;
}

/* core/jpeg_check.c - refuses the JPEG files that stb_image 2.27, as distributions ship it, does not survive.
 *
 * Source   ITU-T T.81, annex B. What 2.28 fixed and this check stands in for (github.com/nothings/stb issues): Huffman tables
 *          of more than 256 codes (1289, 1291), DC symbols above 15 (1108), sampling factors that are no whole ratio (1178).
 * The whole file is walked segment by segment, since a progressive file defines tables between its scans. The walk is
 * strict: bytes between segments that belong to none, which decoders disagree about, are refused. */
#include "core/image_internal.h"

typedef struct {
    const char *name;
    const uint8_t *p;
    size_t num_bytes;
    size_t at;
    rf_error *err;
} walker;

static rf_status bad(const walker *w, const char *what) {
    return rf_fail(w->err, RF_ERR_FORMAT, "%s: byte %zu: damaged JPEG image: %s", w->name, w->at, what);
}

/* Tables of a DHT segment: class and index, 16 counts, then that many symbols. */
static rf_status check_huffman(const walker *w, const uint8_t *p, size_t num) {
    while (num > 0) {
        if (num < 17) return bad(w, "a cut Huffman table");
        bool is_dc = p[0] >> 4 == 0;
        size_t num_codes = 0;
        for (int i = 1; i <= 16; i++) num_codes += p[i];
        if (num_codes > 256) return bad(w, "a Huffman table of more than 256 codes");
        if (num - 17 < num_codes) return bad(w, "a cut Huffman table");
        for (size_t i = 0; i < num_codes; i++) {
            if (is_dc && p[17 + i] > 15) return bad(w, "a DC symbol above 15");
        }
        p += 17 + num_codes;
        num -= 17 + num_codes;
    }
    return RF_OK;
}

static rf_status check_frame(const walker *w, const uint8_t *p, size_t num) {
    int h_max = 1, v_max = 1;
    if (num < 6 || num != 6 + 3 * (size_t)p[5]) return bad(w, "a frame header of the wrong length");
    for (int pass = 0; pass < 2; pass++) { /* the largest factors, then the ratios to them */
        for (int i = 0; i < p[5]; i++) {
            int h = p[7 + 3 * i] >> 4, v = p[7 + 3 * i] & 15;
            if (h < 1 || h > 4 || v < 1 || v > 4) return bad(w, "a sampling factor outside 1 to 4");
            if (pass == 1 && (h_max % h != 0 || v_max % v != 0))
                return bad(w, "sampling factors that are no whole ratio");
            if (h > h_max) h_max = h;
            if (v > v_max) v_max = v;
        }
    }
    return RF_OK;
}

/* Past the coded data of a scan: stuffed zeros and restart markers belong to it. Leaves `at` on the 0xff of a marker. */
static void skip_coded_data(walker *w) {
    while (w->num_bytes - w->at >= 2) {
        uint8_t next = w->p[w->at + 1];
        if (w->p[w->at] == 0xff && next != 0 && next != 0xff && !(next >= 0xd0 && next <= 0xd7)) return;
        w->at++;
    }
}

rf_status rf_jpeg_check(const void *bytes, size_t num_bytes, const char *name, rf_error *err) {
    walker w = {.name = name, .p = bytes, .num_bytes = num_bytes, .at = 2, .err = err};
    for (;;) {
        if (num_bytes - w.at < 2) return bad(&w, "it ends before its end marker");
        if (w.p[w.at] != 0xff) return bad(&w, "a marker was expected");
        uint8_t marker = w.p[w.at + 1];
        if (marker == 0xff) { /* fill byte */
            w.at++;
            continue;
        }
        if (marker == 0xd9) return RF_OK;
        if (num_bytes - w.at < 4) return bad(&w, "a cut segment");
        size_t len = (size_t)w.p[w.at + 2] << 8 | w.p[w.at + 3];
        if (len < 2 || len > num_bytes - w.at - 2) return bad(&w, "a segment longer than the file");
        const uint8_t *body = w.p + w.at + 4;
        rf_status st = RF_OK;
        if (marker == 0xc4) st = check_huffman(&w, body, len - 2);
        if (marker >= 0xc0 && marker <= 0xc2) st = check_frame(&w, body, len - 2);
        if (st != RF_OK) return st;
        w.at += 2 + len;
        if (marker == 0xda) skip_coded_data(&w);
    }
}

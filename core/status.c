/* core/status.c - formatting of the one-line message. */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define MESSAGE_BYTES sizeof(((rf_error *)0)->message)

/* A name from a file may hold any byte; a message is one line that a terminal can show. */
static void keep_one_line(char *s) {
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c < 0x20 || c == 0x7f) *s = '?';
    }
}

rf_status rf_fail(rf_error *err, rf_status status, const char *format, ...) {
    if (!err) return status;
    /* Through a buffer, since an argument may point into err->message. */
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    keep_one_line(text);
    memcpy(err->message, text, sizeof text);
    err->status = status;
    return status;
}

static void append(char text[MESSAGE_BYTES], size_t *used, const char *s) {
    size_t len = strnlen(s, MESSAGE_BYTES);
    if (len > MESSAGE_BYTES - 1 - *used) len = MESSAGE_BYTES - 1 - *used;
    memcpy(text + *used, s, len);
    *used += len;
}

rf_status rf_fail_prefix(rf_error *err, rf_status status, const char *format, ...) {
    if (!err) return status;
    char text[MESSAGE_BYTES];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len < 0) len = 0;
    size_t used = (size_t)len < sizeof text ? (size_t)len : sizeof text - 1;
    append(text, &used, ": ");
    append(text, &used, err->message);
    text[used] = 0;
    keep_one_line(text);
    memcpy(err->message, text, sizeof text);
    err->status = status;
    return status;
}

const char *rf_status_name(rf_status status) {
    switch (status) {
    case RF_OK: return "ok";
    case RF_ERR_ARGUMENT: return "argument";
    case RF_ERR_IO: return "io";
    case RF_ERR_FORMAT: return "format";
    case RF_ERR_CONFIG: return "config";
    case RF_ERR_MISSING: return "missing";
    case RF_ERR_SHAPE: return "shape";
    case RF_ERR_DTYPE: return "dtype";
    case RF_ERR_UNSUPPORTED: return "unsupported";
    case RF_ERR_MEMORY: return "memory";
    case RF_ERR_DEVICE: return "device";
    case RF_ERR_DEVICE_MEMORY: return "device-memory";
    case RF_ERR_WORKSPACE: return "workspace";
    case RF_ERR_STATE: return "state";
    case RF_ERR_CANCELLED: return "cancelled";
    }
    return "unknown";
}

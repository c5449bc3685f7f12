/* core/status.h - one status for every call, one message for the caller.
 *
 * A library call returns RF_OK or one of the codes below and, if `err` is not NULL, writes one line that names the
 * object, what was wanted and what was found. Nothing in the library exits, aborts or prints. */
#ifndef RF_CORE_STATUS_H
#define RF_CORE_STATUS_H

#include "core/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    RF_OK = 0,
    RF_ERR_ARGUMENT,    /* an option or argument has a value it may not have */
    RF_ERR_IO,          /* open, read, write, rename, disk full */
    RF_ERR_FORMAT,      /* a file's bytes break its format */
    RF_ERR_CONFIG,      /* a well-formed config asks for something wrong */
    RF_ERR_MISSING,     /* a tensor, key or file that must be there is not */
    RF_ERR_SHAPE,       /* shapes disagree */
    RF_ERR_DTYPE,       /* a dtype that cannot be read or used here */
    RF_ERR_UNSUPPORTED, /* understood, but no implementation on this backend */
    RF_ERR_MEMORY,      /* host memory */
    RF_ERR_DEVICE,      /* no such device, or a device call failed */
    RF_ERR_DEVICE_MEMORY,
    RF_ERR_WORKSPACE, /* a scratch buffer is too small */
    RF_ERR_STATE,     /* calls in the wrong order */
    RF_ERR_CANCELLED  /* a callback asked to stop */
} rf_status;

typedef struct {
    rf_status status;
    char message[512]; /* one line, no newline at the end */
} rf_error;

/* Formats the message (printf style), stores the status, returns it. err may be NULL. A message too long is cut. */
rf_status rf_fail(rf_error *err, rf_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* Puts "prefix: " in front of the message already in err and returns its status: for callers who know the file name. */
rf_status rf_fail_prefix(rf_error *err, rf_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* Hands a failure on: for functions that own nothing at that point. */
#define RF_TRY(call)                                                                                                   \
    do {                                                                                                               \
        rf_status try_status = (call);                                                                                 \
        if (try_status != RF_OK) return try_status;                                                                    \
    } while (0)

/* A short name: "argument", "io", ... static storage. */
const char *rf_status_name(rf_status status);

#ifdef __cplusplus
}
#endif
#endif

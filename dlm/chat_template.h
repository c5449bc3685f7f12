/* dlm/chat_template.h - chat templates of Hugging Face folders: a conversation to the text that a model was trained on.
 *
 * Templates are Jinja. This reads the part of it that the templates of Llama-3, Qwen2, Qwen3 and LLaDA are written in, and
 * renders what transformers' apply_chat_template does (trim_blocks, lstrip_blocks):
 *   statements   if, elif, else, for (with unpacking, if and else), set (also of a namespace's attribute), break, continue,
 *                generation; comments; white space control
 *   expressions  literals, + - * / // % ~, comparisons, in, and, or, not, a if b else c, attributes, items, slices, calls
 *   filters      trim length count upper lower tojson join first last default d list string replace items safe
 *                select reject
 *   tests        defined undefined none string mapping iterable sequence number integer float boolean true false odd even
 *                eq equalto ne in
 *   functions    namespace range raise_exception strftime_now, and of a string startswith endswith strip lstrip rstrip split
 *                upper lower replace, of a mapping items keys values get
 * Anything else is refused by name and line, when the template is read where that can be seen there. Values that Jinja
 * would print with Python's repr (lists, mappings) are refused too.
 * Limits: 1 MiB of template, 10 million steps, 256 MiB of text and memory. */
#ifndef RF_DLM_CHAT_TEMPLATE_H
#define RF_DLM_CHAT_TEMPLATE_H

#include "core/json.h"
#include "dlm/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_chat_template rf_chat_template;

typedef struct {
    const char *role;    /* "system", "user", "assistant" */
    const char *content; /* valid UTF-8 */
    size_t content_bytes;
} rf_chat_message;

typedef struct {
    bool add_generation_prompt;     /* the text ends where the assistant begins to speak */
    const rf_json_value *variables; /* an object whose members the template sees by name (enable_thinking, tools,
                                     * date_string, messages in place of those given, ...); may be NULL */
} rf_chat_options;

/* chat_template.jinja of the folder if it is there, else chat_template of tokenizer_config.json: a string, or of a list of
 * named templates the one named "default". RF_ERR_MISSING if there is none. */
rf_status rf_chat_template_open(rf_chat_template **out, const char *folder, rf_error *err);
/* The same from memory. config: tokenizer_config.json, for bos_token and its like, may be NULL; not kept. name stands in
 * messages. */
rf_status rf_chat_template_parse(rf_chat_template **out, const char *source, size_t num_bytes,
                                 const rf_json_value *config, const char *name, rf_error *err);
void rf_chat_template_close(rf_chat_template *t); /* NULL is a no-op */

/* There must be a message. Appends the text to out; on failure out is as it was. Threads may share a template. RF_ERR_ARGUMENT with the template's own
 * message where it raises one. */
rf_status rf_chat_template_render(const rf_chat_template *t, const rf_chat_message *messages, size_t num_messages,
                                  const rf_chat_options *options, rf_text *out, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif

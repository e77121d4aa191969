/* NVVM, nvJitLink and NVRTC as far as numba-cuda needs them: LLVM's code stays LLVM's code.

   What is "compiled" and "linked" is the text of all modules, one after another. The driver's
   stand-in has it compiled for the processor when it is loaded. */

#include <stdlib.h>
#include <string.h>

#define MARK "\n; standin: next module\n"

struct text {
    char *bytes;
    size_t size;
};

static void append(struct text *text, const char *bytes, size_t size) {
    text->bytes = realloc(text->bytes, text->size + size + 1);
    memcpy(text->bytes + text->size, bytes, size);
    text->size += size;
    text->bytes[text->size] = 0;
}

static int begin(struct text **made) {
    *made = calloc(1, sizeof **made);
    append(*made, "", 0);
    return 0;
}

static int end(struct text **made) {
    free((*made)->bytes);
    free(*made);
    *made = NULL;
    return 0;
}

static int size_of(struct text *text, size_t *size) {
    *size = text->size + 1;
    return 0;
}

static int copy_of(struct text *text, char *out) {
    memcpy(out, text->bytes, text->size + 1);
    return 0;
}

static int empty(char *out) {
    *out = 0;
    return 0;
}

static int one(size_t *size) {
    *size = 1;
    return 0;
}

/* NVVM */

const char *nvvmGetErrorString(int code) { return code ? "error of the stand-in" : "none"; }
int nvvmVersion(int *major, int *minor) { return *major = 2, *minor = 0, 0; }
int nvvmIRVersion(int *major, int *minor, int *debug, int *debug_minor) {
    return *major = 2, *minor = 0, *debug = 3, *debug_minor = 1, 0;
}
int nvvmCreateProgram(struct text **program) { return begin(program); }
int nvvmDestroyProgram(struct text **program) { return end(program); }
int nvvmAddModuleToProgram(struct text *program, const char *code, size_t size, const char *name) {
    (void)name;
    append(program, MARK, sizeof MARK - 1);
    append(program, code, size);
    return 0;
}
/* libdevice: its functions are the processor's own. */
int nvvmLazyAddModuleToProgram(struct text *program, const char *code, size_t size, const char *n) {
    return (void)program, (void)code, (void)size, (void)n, 0;
}
int nvvmVerifyProgram(struct text *program, int count, const char **options) {
    return (void)program, (void)count, (void)options, 0;
}
int nvvmCompileProgram(struct text *program, int count, const char **options) {
    return (void)program, (void)count, (void)options, 0;
}
int nvvmGetCompiledResultSize(struct text *program, size_t *size) { return size_of(program, size); }
int nvvmGetCompiledResult(struct text *program, char *out) { return copy_of(program, out); }
int nvvmGetProgramLogSize(struct text *program, size_t *size) { return (void)program, one(size); }
int nvvmGetProgramLog(struct text *program, char *out) { return (void)program, empty(out); }

/* nvJitLink */

int nvJitLinkVersion(unsigned *major, unsigned *minor) { return *major = 13, *minor = 0, 0; }
int nvJitLinkCreate(struct text **link, unsigned count, const char **options) {
    return (void)count, (void)options, begin(link);
}
int nvJitLinkDestroy(struct text **link) { return end(link); }
int nvJitLinkAddData(struct text *link, int kind, const void *data, size_t size, const char *name) {
    (void)kind, (void)name;
    append(link, data, strnlen(data, size));
    return 0;
}
int nvJitLinkComplete(struct text *link) { return (void)link, 0; }
int nvJitLinkGetLinkedCubinSize(struct text *link, size_t *size) { return size_of(link, size); }
int nvJitLinkGetLinkedCubin(struct text *link, void *out) { return copy_of(link, out); }
int nvJitLinkGetErrorLogSize(struct text *link, size_t *size) { return (void)link, one(size); }
int nvJitLinkGetErrorLog(struct text *link, char *out) { return (void)link, empty(out); }
int nvJitLinkGetInfoLogSize(struct text *link, size_t *size) { return (void)link, one(size); }
int nvJitLinkGetInfoLog(struct text *link, char *out) { return (void)link, empty(out); }

/* NVRTC: asked only which GPUs it knows. */

static const int KNOWN[] = {80, 90};

const char *nvrtcGetErrorString(int code) { return code ? "error of the stand-in" : "none"; }
int nvrtcVersion(int *major, int *minor) { return *major = 13, *minor = 0, 0; }
int nvrtcGetNumSupportedArchs(int *count) {
    return *count = sizeof KNOWN / sizeof *KNOWN, 0;
}
int nvrtcGetSupportedArchs(int *out) {
    memcpy(out, KNOWN, sizeof KNOWN);
    return 0;
}

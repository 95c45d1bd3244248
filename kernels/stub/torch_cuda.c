/* Stands in for torch's libtorch_cuda.so while the CUDA library is linked, because a CPU build of torch has none. These
 * three functions are all that the CUDA library needs of it; the rest of the stable ABI is in libtorch_cpu.so. At run
 * time torch's own library is there. Tests load this one instead, to see the ops registered without a GPU, so each
 * function reports an error. */

int aoti_torch_get_current_cuda_stream(int device_index, void** stream) {
    (void)device_index;
    *stream = 0;
    return 1;
}

int torch_c10_cuda_check_msg(int error, const char* file, const char* function, unsigned line, _Bool device_assertions,
                             char** message) {
    (void)error, (void)file, (void)function, (void)line, (void)device_assertions;
    *message = "this is the stand-in of libtorch_cuda.so, which cannot run anything";
    return 1;
}

void torch_c10_cuda_free_error_msg(char* message) { (void)message; }

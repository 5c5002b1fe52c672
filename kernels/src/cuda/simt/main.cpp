// A device of one kind of commands, read from standard input, answered on standard output (little endian):
//   1 id:u64 bytes:u64 data           makes a buffer
//   2 id:u64                          answers its bytes
//   3 id:u64                          frees it
//   4 name arguments links grid:3*u32 threads:u32 shared:u64 order:u64 cluster:u32    launches; answers 1, or 0 for an unknown kernel
//     name, arguments: length:u32 bytes; links: count:u32 (offset:u32 id:u64), pointers to buffers within the arguments
// ATTAR_SIMT_KERNELS names the kernels to include.
#include "simt.hpp"

#include ATTAR_SIMT_KERNELS

static void take(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) std::_Exit(bytes == 1 ? 0 : 71);
}
template <class T>
static T take() {
  T v;
  take(&v, sizeof v);
  return v;
}

int main() {
  struct Buffer {
    void* data;
    size_t bytes;
  };
  std::map<uint64_t, Buffer> buffers;
  for (;;) {
    const auto command = take<unsigned char>();
    if (command == 1) {
      const auto id = take<uint64_t>();
      Buffer buffer{nullptr, take<uint64_t>()};
      if (posix_memalign(&buffer.data, 256, buffer.bytes ? buffer.bytes : 1)) return 72;
      take(buffer.data, buffer.bytes);
      buffers[id] = buffer;
    } else if (command == 2) {
      const Buffer& buffer = buffers.at(take<uint64_t>());
      std::fwrite(buffer.data, 1, buffer.bytes, stdout);
      std::fflush(stdout);
    } else if (command == 3) {
      const auto id = take<uint64_t>();
      std::free(buffers.at(id).data);
      buffers.erase(id);
    } else if (command == 4) {
      std::string name(take<uint32_t>(), 0);
      take(&name[0], name.size());
      std::vector<unsigned char> arguments(take<uint32_t>());
      take(arguments.data(), arguments.size());
      for (auto links = take<uint32_t>(); links > 0; links--) {
        const auto offset = take<uint32_t>();
        std::memcpy(&arguments.at(offset), &buffers.at(take<uint64_t>()).data, 8);
      }
      Dim3 grid;
      grid.x = take<uint32_t>();
      grid.y = take<uint32_t>();
      grid.z = take<uint32_t>();
      const auto threads = take<uint32_t>();
      const auto shared = take<uint64_t>();
      const auto order = take<uint64_t>();
      const auto cluster = take<uint32_t>();
      const auto kernel = simt::kernels().find(name);
      const unsigned char found = kernel != simt::kernels().end() && kernel->second.argument == arguments.size();
      if (found) simt::launch(kernel->second.run, arguments.data(), grid, threads, shared, order, cluster, kernel->second.registers);
      std::fwrite(&found, 1, 1, stdout);
      std::fflush(stdout);
    } else {
      return 73;
    }
  }
}

# Builds `_cuda`, the Python module of CUDA kernels, where nvcc works. It is a module of its own, so
# that a machine without CUDA lacks nothing else.
#
#   CA3D_CUDA        auto (the default): if nvcc can compile for this machine; on: or fail; off
#   CA3D_CUDA_ARCHS  such as "80;90", or "all": 75, 80, 86, 87, 89, 90, 100 and 120 as far as nvcc
#                    knows them. The default are the GPUs of this machine, and without one 80, 90, 120;
#                    PTX serves all others that are newer than the lowest.
set(CA3D_CUDA "auto" CACHE STRING "Whether to build the CUDA kernels: auto, on or off")
set(CA3D_CUDA_ARCHS "" CACHE STRING "Architectures to build for, such as 80;90, or all")

if(NOT CA3D_CUDA MATCHES "^(auto|on|off)$")
  message(FATAL_ERROR "CA3D_CUDA must be auto, on or off, got '${CA3D_CUDA}'")
endif()

# Ends the build with CA3D_CUDA=on, goes on without CUDA otherwise.
macro(without_cuda reason)
  if(CA3D_CUDA STREQUAL "on")
    message(FATAL_ERROR "CA3D_CUDA=on, but ${reason}")
  endif()
  message(STATUS "CUDA kernels are not built: ${reason}")
  return()
endmacro()

# The compute capabilities of this machine's GPUs, such as 86;90.
function(find_gpus result)
  set(found "")
  find_program(nvidia_smi nvidia-smi)
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE text RESULT_VARIABLE status ERROR_QUIET)
    if(status EQUAL 0)
      string(REPLACE "." "" text "${text}")
      string(REGEX MATCHALL "[0-9]+" found "${text}")
      list(REMOVE_DUPLICATES found)
    endif()
  endif()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

function(add_cuda_module)
  if(CA3D_CUDA STREQUAL "off")
    message(STATUS "CUDA kernels are not built: CA3D_CUDA=off")
    return()
  endif()
  find_package(CUDAToolkit QUIET)
  if(NOT CUDAToolkit_NVCC_EXECUTABLE)
    without_cuda("nvcc was not found")
  endif()
  if(NOT TARGET CUDA::cudart_static)
    without_cuda("the static CUDA runtime was not found beside ${CUDAToolkit_NVCC_EXECUTABLE}")
  endif()

  execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} --list-gpu-arch OUTPUT_VARIABLE offered)
  string(REGEX MATCHALL "[0-9]+" offered "${offered}")
  set(wanted "${CA3D_CUDA_ARCHS}")
  if(NOT wanted)
    find_gpus(wanted)
  endif()
  if(NOT wanted)
    set(wanted 80 90 120)
  elseif(wanted STREQUAL "all")
    set(wanted 75 80 86 87 89 90 100 120)
  endif()
  string(REGEX MATCHALL "[0-9]+" wanted "${wanted}")
  set(archs "")
  foreach(arch IN LISTS wanted)
    if(arch IN_LIST offered)
      list(APPEND archs ${arch})
    endif()
  endforeach()
  if(NOT archs)
    without_cuda("nvcc offers none of the architectures ${wanted}")
  endif()
  list(SORT archs COMPARE NATURAL)

  # Machine code comes from as few PTX as possible, because nvcc spends most of its time before it:
  # from that of the lowest architecture for those before 80, which lack the conversion to bfloat16
  # and get integer operations in its place, and from that of the lowest of the others. These
  # kernels use nothing that is newer.
  set(older ${archs})
  list(FILTER older INCLUDE REGEX "^[1-7][0-9]$")
  set(newer ${archs})
  list(FILTER newer EXCLUDE REGEX "^[1-7][0-9]$")
  set(gencode "")
  set(code "")
  foreach(group older newer)
    if(${group})
      list(GET ${group} 0 lowest)
      list(TRANSFORM ${group} PREPEND "sm_" OUTPUT_VARIABLE codes)
      list(APPEND codes "compute_${lowest}")
      list(APPEND code ${codes})
      list(JOIN codes "," codes)
      list(APPEND gencode "-gencode=arch=compute_${lowest},code=[${codes}]")
    endif()
  endforeach()
  list(JOIN code "," code)

  set(flags -std=c++17 -O3 -lineinfo ${gencode} --threads 0 -ccbin ${CMAKE_CXX_COMPILER}
            -Xcompiler=-fPIC,-fvisibility=hidden -I${CMAKE_SOURCE_DIR}/csrc)
  file(WRITE ${CMAKE_BINARY_DIR}/trial.cu "__global__ void trial() {}\n")
  execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${flags} -c ${CMAKE_BINARY_DIR}/trial.cu
                          -o ${CMAKE_BINARY_DIR}/trial.o
                  RESULT_VARIABLE status OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    without_cuda("nvcc can't compile a kernel:\n${output}")
  endif()

  set(objects "")
  foreach(op local_attention preparam_step)
    set(source ${CMAKE_SOURCE_DIR}/csrc/${op}/${op}.cu)
    set(object ${CMAKE_BINARY_DIR}/${op}.cu.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} ${flags} -c ${source} -o ${object}
      DEPENDS ${source}
      COMMENT "Building CUDA object ${op}.cu.o for ${code}"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()

  pybind11_add_module(_cuda NO_EXTRAS csrc/cuda_bindings.cpp csrc/common/cuda_device.cpp
                      csrc/local_attention/cuda_fields.cpp csrc/local_attention/cuda_plan.cpp
                      csrc/local_attention/problem.cpp csrc/preparam_step/checks.cpp
                      csrc/preparam_step/cuda_plan.cpp ${objects})
  target_include_directories(_cuda PRIVATE csrc)
  target_include_directories(_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
  target_compile_definitions(_cuda PRIVATE CA3D_VERSION="${CA3D_VERSION}"
                                           CA3D_CUDA_ARCHS="${code}")
  target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
  message(STATUS "CUDA kernels are built for ${code} by ${CUDAToolkit_NVCC_EXECUTABLE}")
endfunction()

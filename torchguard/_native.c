/* How is an ordinary save recorded, and read, without a step of Python's?
 *
 * Optional: where this module was not built, `_packing.py` and `_reads.py` do all of it themselves. What stands here is
 * their way through a plain tensor of which there is nothing to say, and nothing else: whatever is out of the ordinary
 * (a subclass, a mode, sparse memory, an alias that lives, memory that others hold, a Function of the user's, a moved
 * version, ...) is handed, untouched, to the function of theirs that `Pack` and `Unpack` were made with. So each rule
 * is explained there; here it is only said which of them a step answers.
 *
 * No header of torch is used: tensors and nodes are asked by the names that they have in Python.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <frameobject.h> /* PyFrame_GetBack, before 3.11 */
#include <stddef.h>
#include <structmember.h>

/* Moves whenever what is handed over here, or what it means, is changed: `_fast.py` uses no other. */
#define REVISION 2

/* ---- a save ---------------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    PyObject *weak_references;
    PyObject *tensor;
    PyObject *code;
    PyObject *inner_code;
    PyObject *node;
    PyObject *remarks;
    long long version;
    unsigned long long storage;
    int offset;
    int inner_offset;
    int output;
} Fields;

static int
fields_traverse(Fields *self, visitproc visit, void *arg)
{
    Py_VISIT(self->tensor);
    Py_VISIT(self->code);
    Py_VISIT(self->inner_code);
    Py_VISIT(self->node);
    Py_VISIT(self->remarks);
    return 0;
}

static int
fields_clear(Fields *self)
{
    Py_CLEAR(self->tensor);
    Py_CLEAR(self->code);
    Py_CLEAR(self->inner_code);
    Py_CLEAR(self->node);
    Py_CLEAR(self->remarks);
    return 0;
}

static void
fields_dealloc(Fields *self)
{
    PyObject_GC_UnTrack(self);
    if (self->weak_references != NULL) {
        PyObject_ClearWeakRefs((PyObject *)self);
    }
    fields_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMemberDef fields_members[] = {
    {"tensor", T_OBJECT, offsetof(Fields, tensor), 0, NULL},
    {"code", T_OBJECT, offsetof(Fields, code), 0, NULL},
    {"inner_code", T_OBJECT, offsetof(Fields, inner_code), 0, NULL},
    {"node", T_OBJECT, offsetof(Fields, node), 0, NULL},
    {"remarks", T_OBJECT, offsetof(Fields, remarks), 0, NULL},
    {"version", T_LONGLONG, offsetof(Fields, version), 0, NULL},
    {"storage", T_ULONGLONG, offsetof(Fields, storage), 0, NULL},
    {"offset", T_INT, offsetof(Fields, offset), 0, NULL},
    {"inner_offset", T_INT, offsetof(Fields, inner_offset), 0, NULL},
    {"output", T_INT, offsetof(Fields, output), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyTypeObject FieldsType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchguard._native.Fields",
    .tp_doc = "The attributes of a save.",
    .tp_basicsize = sizeof(Fields),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_dealloc = (destructor)fields_dealloc,
    .tp_traverse = (traverseproc)fields_traverse,
    .tp_clear = (inquiry)fields_clear,
    .tp_weaklistoffset = offsetof(Fields, weak_references),
    .tp_members = fields_members,
};

/* ---- what is asked of tensors and nodes -------------------------------------------------------------------------- */

static PyObject *name_version, *name_nested, *name_grad_fn, *name_sequence_nr, *name_is_view, *name_base;
static PyObject *name_output_nr, *name_detach, *name_exports, *name_f_lasti;
static PyObject *name_untyped_storage, *name_resizable, *name_counter, *name_expected;

/* The number that an attribute, or a call, gives; -1 with an exception where it is none. A leaf's node has the largest
 * number that there is, which is more than is needed to tell here. */
static long long
as_number(PyObject *value)
{
    if (value == NULL) {
        return -1;
    }
    int overflow = 0;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    Py_DECREF(value);
    return overflow == 0 ? number : overflow > 0 ? LLONG_MAX : LLONG_MIN;
}

/* 1, 0, or -1 with an exception. */
static int
as_truth(PyObject *value)
{
    if (value == NULL) {
        return -1;
    }
    int truth = value == Py_True ? 1 : value == Py_False ? 0 : PyObject_IsTrue(value);
    Py_DECREF(value);
    return truth;
}

/* Whether a tensor is of one of the two types that nobody has made a subclass of. */
static int
is_plain(PyObject *tensor, PyObject *tensor_type, PyObject *parameter_type)
{
    PyObject *type = (PyObject *)Py_TYPE(tensor);
    return type == tensor_type || type == parameter_type;
}

/* What failed is left to Python, which meets it again and says what is to be said: 0; -1: somebody interrupts. */
static int
left_to_python(void)
{
    if (!PyErr_ExceptionMatches(PyExc_Exception)) {
        return -1;
    }
    PyErr_Clear();
    return 0;
}

static PyObject *
call_method(PyObject *self, PyObject *name)
{
    return PyObject_VectorcallMethod(name, &self, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

static PyObject *
call_with(PyObject *function, PyObject *argument)
{
    PyObject *arguments[2] = {NULL, argument};
    return PyObject_Vectorcall(function, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

static PyObject *
call(PyObject *function)
{
    return PyObject_Vectorcall(function, NULL, 0, NULL);
}

static int
last_instruction(PyFrameObject *frame)
{
#if PY_VERSION_HEX >= 0x030B0000
    return PyFrame_GetLasti(frame);
#else
    return (int)as_number(PyObject_GetAttr((PyObject *)frame, name_f_lasti));
#endif
}

/* Tables of the objects that a hook is made with: name of the argument, and where it is kept. */
typedef struct {
    const char *name;
    Py_ssize_t offset;
} Given;

#define GIVEN(self, one) (*(PyObject **)((char *)(self) + (one)->offset))

static int
take(PyObject *self, const Given *table, PyObject *arguments, PyObject *keywords)
{
    if (PyTuple_GET_SIZE(arguments) != 0 || keywords == NULL) {
        PyErr_SetString(PyExc_TypeError, "keyword arguments are asked for, and no others");
        return -1;
    }
    for (const Given *one = table; one->name != NULL; one++) {
        PyObject *value = PyDict_GetItemString(keywords, one->name);
        if (value == NULL) {
            PyErr_Format(PyExc_TypeError, "%s is missing", one->name);
            return -1;
        }
        Py_INCREF(value);
        Py_XSETREF(GIVEN(self, one), value);
    }
    return 0;
}

static void
visit_given(PyObject *self, const Given *table, visitproc visit, void *arg, int *result)
{
    for (const Given *one = table; one->name != NULL && *result == 0; one++) {
        if (GIVEN(self, one) != NULL) {
            *result = visit(GIVEN(self, one), arg);
        }
    }
}

static void
clear_given(PyObject *self, const Given *table)
{
    for (const Given *one = table; one->name != NULL; one++) {
        Py_CLEAR(GIVEN(self, one));
    }
}

/* Whether a descriptor was made with what it needs, and has it still. */
static int
is_made(PyObject *original)
{
    if (original == NULL) {
        PyErr_SetString(PyExc_TypeError, "this is made by torchguard only");
        return 0;
    }
    return 1;
}

#define COLLECTED(type, table)                                     \
    static int type##_traverse(PyObject *self, visitproc visit, void *arg) \
    {                                                              \
        int result = 0;                                            \
        visit_given(self, table, visit, arg, &result);             \
        return result;                                             \
    }                                                              \
    static int type##_clear(PyObject *self)                        \
    {                                                              \
        clear_given(self, table);                                  \
        return 0;                                                  \
    }                                                              \
    static void type##_dealloc(PyObject *self)                     \
    {                                                              \
        PyObject_GC_UnTrack(self);                                 \
        clear_given(self, table);                                  \
        Py_TYPE(self)->tp_free(self);                              \
    }

/* Whether what a weak reference, borrowed, is to lives. 1, 0, or -1 with an exception. */
static int
refers(PyObject *reference)
{
    Py_INCREF(reference); /* under an old torch calling it is a step of Python's */
    PyObject *referent = call(reference);
    Py_DECREF(reference);
    if (referent == NULL) {
        return -1;
    }
    int lives = referent != Py_None;
    Py_DECREF(referent);
    return lives;
}

/* Whether no counter of an alias of the storage has moved unseen (AliasRecord.is_quiet, Aliases.meet_save). 1: none;
 * 2: none, and another alias than `saved`, which may be NULL, lives; 0: not to be told here; -1: an exception. */
static int
are_quiet(PyObject *aliases, PyObject *storage, PyObject *saved, PyObject *tensor_type)
{
    PyObject *records = PyDict_GetItemWithError(aliases, storage);
    if (records == NULL) {
        return PyErr_Occurred() ? -1 : 1;
    }
    if (!PyList_CheckExact(records) || PyList_GET_SIZE(records) > 4) {
        return 0;
    }
    int quiet = 1, others = 0;
    Py_INCREF(records);
    for (Py_ssize_t i = 0; quiet == 1 && i < PyList_GET_SIZE(records); i++) {
        PyObject *record = PyList_GET_ITEM(records, i);
        Py_INCREF(record);
        if (saved != NULL) {
            PyObject *alias = call(record);
            quiet = alias == NULL ? -1 : alias != Py_None;
            others = others || alias != saved;
            Py_XDECREF(alias);
        }
        if (quiet == 1) {
            PyObject *counter = PyObject_GetAttr(record, name_counter);
            if (counter == NULL || Py_TYPE(counter) != (PyTypeObject *)tensor_type) {
                quiet = counter == NULL ? -1 : 0;
            } else {
                long long version = as_number(PyObject_GetAttr(counter, name_version));
                long long expected = PyErr_Occurred() ? -1 : as_number(PyObject_GetAttr(record, name_expected));
                quiet = PyErr_Occurred() ? -1 : version == expected;
            }
            Py_XDECREF(counter);
        }
        Py_DECREF(record);
    }
    Py_DECREF(records);
    return quiet == 1 && others ? 2 : quiet;
}

/* ---- the pack hook ----------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *otherwise;      /* the same in Python: takes what is out of the ordinary */
    PyObject *save_type;
    PyObject *tensor_type, *parameter_type;
    PyObject *mode_active, *storage_id, *next_number;
    PyObject *output_after_all, *is_open, *mend_foreach, *keep_small_proof;
    PyObject *inside_library, *own_files, *apply_code;
    PyObject *generic_node, *view_node, *own_nodes, *saves_no_output;
    PyObject *young, *aliases, *exports, *dead_exports, *recording;
    PyObject *pending, *append, *file;
    PyObject *file_at_object, *fresh_object, *first_object;
    Py_ssize_t file_at;
    Py_ssize_t fresh;         /* references to a tensor that no Python holds */
    long long first;
    PyObject *of_user;        /* code of the user's that has saved last */
    long long walked_number;  /* the last walk up the stack: from where, and where it led to */
    PyObject *walked_code;
    int walked_offset;
    PyObject *found_code;
    int found_offset;
} Pack;

#define AT(field) {#field, offsetof(Pack, field)}
static const Given pack_given[] = {
    AT(otherwise), AT(save_type), AT(tensor_type), AT(parameter_type), AT(mode_active), AT(storage_id), AT(next_number),
    AT(output_after_all), AT(is_open), AT(mend_foreach), AT(keep_small_proof), AT(inside_library), AT(own_files), AT(apply_code),
    AT(generic_node), AT(view_node), AT(own_nodes), AT(saves_no_output), AT(young), AT(aliases), AT(exports),
    AT(dead_exports), AT(recording), AT(pending), AT(append), AT(file),
    {"file_at", offsetof(Pack, file_at_object)}, {"fresh", offsetof(Pack, fresh_object)},
    {"first", offsetof(Pack, first_object)}, {NULL, 0},
};
#undef AT

/* Where in the user's code the operation was called. 1: told; 0: not to be told here; -1: an exception. */
static int
place(Pack *self, Fields *save, long long number)
{
    PyFrameObject *frame = PyEval_GetFrame();
    if (frame == NULL) { /* an autograd thread */
        return 1;
    }
    PyCodeObject *code = PyFrame_GetCode(frame);
    int offset = last_instruction(frame);
    save->inner_code = (PyObject *)code;
    save->inner_offset = offset;
    PyObject *found = NULL;
    if ((PyObject *)code == self->of_user) {
        found = (PyObject *)code;
    } else if (self->walked_number == number && self->walked_code == (PyObject *)code && self->walked_offset == offset) {
        found = self->found_code;
        offset = self->found_offset;
    } else {
        PyObject *inside = PyDict_GetItemWithError(self->inside_library, code->co_filename);
        if (inside == Py_False) {
            Py_INCREF(code);
            Py_XSETREF(self->of_user, (PyObject *)code);
            found = (PyObject *)code;
        } else {
            if (inside == NULL) {
                return PyErr_Occurred() ? -1 : 0; /* a file that was not met yet */
            }
            int own = PySet_Contains(self->own_files, code->co_filename);
            if (own != 0) {
                return own < 0 ? -1 : 0;
            }
            PyFrameObject *above = PyFrame_GetBack(frame);
            while (above != NULL) {
                PyCodeObject *its = PyFrame_GetCode(above);
                inside = PyDict_GetItemWithError(self->inside_library, its->co_filename);
                if (inside == Py_False) {
                    offset = last_instruction(above);
                    found = (PyObject *)its;
                    Py_DECREF(above);
                    break;
                }
                Py_DECREF(its);
                if (inside == NULL) {
                    Py_DECREF(above);
                    return PyErr_Occurred() ? -1 : 0;
                }
                PyFrameObject *next = PyFrame_GetBack(above);
                Py_DECREF(above);
                above = next;
            }
            offset = found == NULL ? 0 : offset;
            PyObject *walked_before = self->walked_code, *found_before = self->found_code;
            self->walked_number = number; /* all of it before anything is let go of, which may run code */
            self->walked_code = Py_NewRef((PyObject *)code);
            self->walked_offset = save->inner_offset;
            self->found_code = found; /* the reference that the walk had */
            self->found_offset = offset;
            Py_XINCREF(found);
            save->code = found;
            save->offset = offset;
            Py_XDECREF(walked_before);
            Py_XDECREF(found_before);
            return 1;
        }
    }
    Py_XINCREF(found);
    save->code = found;
    save->offset = found == NULL ? 0 : offset;
    return 1;
}

/* Whether nothing has happened through aliases of the storage; a latest one that is dead is forgotten. 1: nothing; 2:
 * nothing, and one lives; 0: not to be told here; -1: an exception. */
static int
meet_aliases(Pack *self, PyObject *storage, PyObject *tensor)
{
    if (PyDict_GET_SIZE(self->young) != 0) {
        PyObject *latest = PyDict_GetItemWithError(self->young, storage);
        if (latest != NULL) {
            int lives = refers(PyTuple_GET_ITEM(latest, 0));
            if (lives != 0) {
                return lives < 0 ? -1 : 0;
            }
            if (PyDict_DelItem(self->young, storage) < 0 && left_to_python() < 0) { /* another thread was faster */
                return -1;
            }
        } else if (PyErr_Occurred()) {
            return -1;
        }
    }
    if (PyDict_GET_SIZE(self->aliases) != 0) {
        return are_quiet(self->aliases, storage, tensor, self->tensor_type);
    }
    return 1;
}

/* Whether nobody outside torch can write to the memory of the save. 1, 0: nobody here can tell; -1: an exception. */
static int
is_closed(Pack *self, PyObject *storage, Fields *save, PyObject *tensor, PyObject *grad_fn, long long made)
{
    PyObject *known = PyDict_GetItemWithError(self->exports, storage);
    if (known != NULL) {
        Py_INCREF(known);
        int has = as_truth(PyObject_GetAttr(known, name_exports));
        Py_DECREF(known);
        return has < 0 ? -1 : !has;
    }
    if (PyErr_Occurred()) {
        return -1;
    }
    int older;
    if (save->node != NULL) {
        int own = PySet_Contains(self->own_nodes, save->node);
        if (own <= 0) {
            return own;
        }
        older = save->version > 0;
    } else {
        PyObject *base = PyObject_GetAttr(tensor, name_base);
        if (base == NULL) {
            return -1;
        }
        PyObject *asked = grad_fn;
        Py_INCREF(asked);
        int is_view = base != Py_None;
        if (is_view) {
            Py_SETREF(asked, PyObject_GetAttr(base, name_grad_fn));
            if (asked == NULL) {
                Py_DECREF(base);
                return -1;
            }
            if (asked != Py_None) {
                made = as_number(call_method(asked, name_sequence_nr));
            }
        }
        Py_DECREF(base);
        if (PyErr_Occurred()) {
            Py_DECREF(asked);
            return -1;
        }
        if (asked == Py_None) {
            Py_DECREF(asked);
            return !(is_view || Py_REFCNT(tensor) > self->fresh);
        }
        int own = PySet_Contains(self->own_nodes, (PyObject *)Py_TYPE(asked));
        Py_DECREF(asked);
        if (own <= 0) {
            return own;
        }
        older = save->version > 0 || made < self->first;
    }
    if (!older) {
        return 1;
    }
    int open = as_truth(call_with(self->is_open, tensor));
    return open < 0 ? -1 : !open;
}

/* Tell whether the tensor is an output of the node that saves it, and hold what PyTorch holds. 1; 0: not to be told
 * here; -1: an exception. */
static int
hold(Pack *self, Fields *save, PyObject *tensor, PyObject *grad_fn, long long number, long long *made)
{
    int is_output = 0;
    if (grad_fn != Py_None) {
        *made = as_number(call_method(grad_fn, name_sequence_nr));
        if (*made == -1 && PyErr_Occurred()) {
            return -1;
        }
        if (*made == number - 1) {
            is_output = 1;
        } else if (save->inner_code == self->apply_code && save->inner_code != NULL) {
            return 0;
        } else {
            int may_be = save->version != 0;
            if (!may_be && Py_REFCNT(tensor) <= self->fresh) {
                int view = as_truth(call_method(tensor, name_is_view));
                if (view < 0) {
                    return -1;
                }
                may_be = !view;
            }
            if (may_be) {
                int none = PySet_Contains(self->saves_no_output, (PyObject *)Py_TYPE(grad_fn));
                if (none < 0) {
                    return -1;
                }
                if (!none) {
                    PyObject *numbered = PyLong_FromLongLong(number);
                    if (numbered == NULL) {
                        return -1;
                    }
                    PyObject *arguments[4] = {NULL, (PyObject *)save, grad_fn, numbered};
                    is_output = as_truth(PyObject_Vectorcall(
                        self->output_after_all, arguments + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL));
                    Py_DECREF(numbered);
                    if (is_output < 0) {
                        return -1;
                    }
                }
            }
        }
    }
    if (!is_output) {
        return 1; /* the input itself, once nobody asks for the number of its holders any more */
    }
    PyObject *node = (PyObject *)Py_TYPE(grad_fn);
    if (node == self->generic_node || node == self->view_node) {
        return 0;
    }
    Py_INCREF(node);
    save->node = node;
    long long output = as_number(PyObject_GetAttr(tensor, name_output_nr));
    if (output == -1 && PyErr_Occurred()) {
        return -1;
    }
    save->output = (int)output;
    save->tensor = call_method(tensor, name_detach);
    return save->tensor == NULL ? -1 : 1;
}

/* A `_foreach_` operator makes all its nodes before it saves: what was saved before may be an output, too. */
static int
look_back(Pack *self, Fields *save, long long made)
{
    Py_ssize_t waiting = PyObject_Size(self->pending);
    if (waiting <= 0) {
        return (int)waiting;
    }
    PyObject *reference = PySequence_GetItem(self->pending, -1);
    if (reference == NULL) {
        PyErr_Clear();
        return 0;
    }
    PyObject *before = call(reference);
    Py_DECREF(reference);
    if (before == NULL) {
        return -1;
    }
    int result = 0;
    if (PyObject_TypeCheck(before, &FieldsType)) {
        Fields *other = (Fields *)before;
        if ((other->node == NULL || other->node == Py_None) && other->inner_offset == save->inner_offset) {
            PyObject *numbered = PyLong_FromLongLong(made);
            PyObject *code = save->inner_code == NULL ? Py_None : save->inner_code;
            PyObject *arguments[4] = {NULL, save->node, numbered, code};
            PyObject *done = numbered == NULL ? NULL
                                              : PyObject_Vectorcall(self->mend_foreach, arguments + 1,
                                                                    3 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
            result = done == NULL ? -1 : 0;
            Py_XDECREF(done);
            Py_XDECREF(numbered);
        }
    }
    Py_DECREF(before);
    return result;
}

/* Record an ordinary save: 1; 0: it is none; -1: an exception. */
static int
record(Pack *self, PyObject *tensor, Fields **made_of_it)
{
    if (!is_plain(tensor, self->tensor_type, self->parameter_type)) {
        return 0;
    }
    int mode = as_truth(call(self->mode_active));
    if (mode != 0) {
        return mode < 0 ? -1 : 0;
    }
    int dead = PyObject_IsTrue(self->dead_exports);
    if (dead != 0) {
        return dead < 0 ? -1 : 0;
    }
    PyObject *storage = call_with(self->storage_id, tensor);
    if (storage == NULL) { /* sparse, opaque, a functorch wrapper */
        return left_to_python();
    }
    int result = -1;
    PyObject *grad_fn = NULL;
    Fields *save = NULL;
    int nested = as_truth(PyObject_GetAttr(tensor, name_nested));
    int ordinary = nested == 0 ? meet_aliases(self, storage, tensor) : nested < 0 ? -1 : 0;
    if (ordinary > 0 && PyDict_GET_SIZE(self->recording) != 0) {
        int has = PyDict_Contains(self->recording, storage);
        ordinary = has < 0 ? -1 : has ? 0 : ordinary;
    }
    if (ordinary <= 0) {
        result = ordinary;
        goto done;
    }
    PyTypeObject *type = (PyTypeObject *)self->save_type;
    save = (Fields *)type->tp_alloc(type, 0);
    if (save == NULL) {
        goto done;
    }
    save->storage = PyLong_AsUnsignedLongLong(storage);
    save->version = as_number(PyObject_GetAttr(tensor, name_version));
    long long number = as_number(call(self->next_number));
    if (PyErr_Occurred()) {
        goto done;
    }
    if (number < 0) { /* this torch does not tell */
        result = 0;
        goto done;
    }
    result = place(self, save, number);
    if (result != 1) {
        goto done;
    }
    grad_fn = PyObject_GetAttr(tensor, name_grad_fn);
    if (grad_fn == NULL) {
        result = -1;
        goto done;
    }
    long long made = -1;
    result = hold(self, save, tensor, grad_fn, number, &made);
    if (result == 1) {
        result = is_closed(self, storage, save, tensor, grad_fn, made);
    }
    if (result != 1) {
        goto done;
    }
    if (save->node == NULL) {
        Py_INCREF(tensor);
        save->tensor = tensor;
    } else if (look_back(self, save, made) < 0) {
        result = -1;
        goto done;
    }
    PyObject *reference = PyWeakref_NewRef((PyObject *)save, NULL);
    PyObject *appended = reference == NULL ? NULL : call_with(self->append, reference);
    Py_XDECREF(reference);
    if (appended == NULL) {
        result = -1;
        goto done;
    }
    Py_DECREF(appended);
    if (ordinary == 2) { /* somebody may write to it unseen */
        PyObject *proven = call_with(self->keep_small_proof, (PyObject *)save);
        if (proven == NULL) {
            result = -1;
            goto done;
        }
        Py_DECREF(proven);
    }
    if (PyObject_Size(self->pending) > self->file_at) {
        PyObject *filed = call(self->file);
        if (filed == NULL) {
            result = -1;
            goto done;
        }
        Py_DECREF(filed);
    }
done:
    Py_DECREF(storage);
    Py_XDECREF(grad_fn);
    if (result == 1) {
        *made_of_it = save;
    } else {
        Py_XDECREF(save);
    }
    return result;
}

static PyObject *
pack_call(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names)
{
    Pack *self = (Pack *)callable;
    if (PyVectorcall_NARGS(flags) == 1 && names == NULL) {
        Fields *save = NULL;
        int result = record(self, arguments[0], &save);
        if (result != 0) {
            return result < 0 ? NULL : (PyObject *)save;
        }
    }
    return PyObject_Vectorcall(self->otherwise, arguments, flags, names);
}

static int
pack_init(Pack *self, PyObject *arguments, PyObject *keywords)
{
    if (take((PyObject *)self, pack_given, arguments, keywords) < 0) {
        return -1;
    }
    if (!PyType_Check(self->save_type) || !PyType_IsSubtype((PyTypeObject *)self->save_type, &FieldsType)
        || !PyDict_Check(self->inside_library) || !PyDict_Check(self->young) || !PyDict_Check(self->aliases)
        || !PyDict_Check(self->exports) || !PyDict_Check(self->recording) || !PyAnySet_Check(self->own_files)
        || !PyAnySet_Check(self->own_nodes) || !PyAnySet_Check(self->saves_no_output)) {
        PyErr_SetString(PyExc_TypeError, "a type of save, dictionaries and sets are asked for");
        return -1;
    }
    self->file_at = PyLong_AsSsize_t(self->file_at_object);
    self->fresh = PyLong_AsSsize_t(self->fresh_object);
    self->first = PyLong_AsLongLong(self->first_object);
    self->walked_number = -1;
    self->vectorcall = pack_call;
    return PyErr_Occurred() ? -1 : 0;
}

static int
pack_traverse(Pack *self, visitproc visit, void *arg)
{
    int result = 0;
    visit_given((PyObject *)self, pack_given, visit, arg, &result);
    if (result != 0) {
        return result;
    }
    Py_VISIT(self->of_user);
    Py_VISIT(self->walked_code);
    Py_VISIT(self->found_code);
    return 0;
}

static int
pack_clear(Pack *self)
{
    Py_CLEAR(self->of_user);
    Py_CLEAR(self->walked_code);
    Py_CLEAR(self->found_code);
    clear_given((PyObject *)self, pack_given);
    return 0;
}

static void
pack_dealloc(Pack *self)
{
    PyObject_GC_UnTrack(self);
    pack_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyTypeObject PackType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchguard._native.Pack",
    .tp_doc = "A pack hook.",
    .tp_basicsize = sizeof(Pack),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)pack_init,
    .tp_dealloc = (destructor)pack_dealloc,
    .tp_traverse = (traverseproc)pack_traverse,
    .tp_clear = (inquiry)pack_clear,
    .tp_vectorcall_offset = offsetof(Pack, vectorcall),
    .tp_call = PyVectorcall_Call,
};

/* ---- the unpack hook --------------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *otherwise;
    PyObject *collecting;
    PyObject *tensor_type;
    PyObject *mode_active, *storage_id, *records;
    PyObject *young, *aliases;
} Unpack;

#define AT(field) {#field, offsetof(Unpack, field)}
static const Given unpack_given[] = {
    AT(otherwise), AT(collecting), AT(tensor_type), AT(mode_active), AT(storage_id), AT(records), AT(young), AT(aliases),
    {NULL, 0},
};
#undef AT

/* Whether backward can be given the tensor of a save with nothing further said. */
static int
is_as_saved(Unpack *self, Fields *save, PyObject *tensor)
{
    if (PyList_GET_SIZE(self->collecting) != 0 || (save->remarks != NULL && save->remarks != Py_None)) {
        return 0;
    }
    int mode = as_truth(call(self->mode_active));
    if (mode != 0) {
        return mode < 0 ? -1 : 0;
    }
    long long version = as_number(PyObject_GetAttr(tensor, name_version));
    if (version != save->version) {
        return version == -1 && PyErr_Occurred() ? -1 : 0;
    }
    int is_input = save->node == NULL || save->node == Py_None;
    if (is_input || PyDict_GET_SIZE(self->young) != 0 || PyDict_GET_SIZE(self->aliases) != 0) {
        PyObject *storage;
        if (is_input) {
            storage = call_with(self->storage_id, tensor);
            if (storage == NULL) {
                return -1;
            }
            unsigned long long identity = PyLong_AsUnsignedLongLong(storage);
            if (identity != save->storage || PyErr_Occurred()) {
                Py_DECREF(storage);
                return PyErr_Occurred() ? -1 : 0;
            }
        } else {
            storage = PyLong_FromUnsignedLongLong(save->storage);
            if (storage == NULL) {
                return -1;
            }
        }
        int has = PyDict_Contains(self->young, storage);
        int quiet = has == 0 ? are_quiet(self->aliases, storage, NULL, self->tensor_type) : has < 0 ? -1 : 0;
        Py_DECREF(storage);
        if (quiet <= 0) {
            return quiet;
        }
    }
    if (is_input) {
        int records = as_truth(call(self->records));
        return records < 0 ? -1 : !records;
    }
    return 1;
}

static PyObject *
unpack_call(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names)
{
    Unpack *self = (Unpack *)callable;
    if (PyVectorcall_NARGS(flags) == 1 && names == NULL && PyObject_TypeCheck(arguments[0], &FieldsType)) {
        Fields *save = (Fields *)arguments[0];
        PyObject *tensor = save->tensor;
        if (tensor != NULL) {
            Py_INCREF(tensor); /* what is asked may let another thread give the save another one */
            int result = is_as_saved(self, save, tensor);
            if (result < 0) {
                result = left_to_python();
            }
            if (result == 1) {
                return tensor;
            }
            Py_DECREF(tensor);
            if (result < 0) {
                return NULL;
            }
        }
    }
    return PyObject_Vectorcall(self->otherwise, arguments, flags, names);
}

static int
unpack_init(Unpack *self, PyObject *arguments, PyObject *keywords)
{
    if (take((PyObject *)self, unpack_given, arguments, keywords) < 0) {
        return -1;
    }
    if (!PyList_Check(self->collecting) || !PyDict_Check(self->young) || !PyDict_Check(self->aliases)) {
        PyErr_SetString(PyExc_TypeError, "a list and dictionaries are asked for");
        return -1;
    }
    self->vectorcall = unpack_call;
    return 0;
}

COLLECTED(unpack, unpack_given)

static PyTypeObject UnpackType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchguard._native.Unpack",
    .tp_doc = "An unpack hook.",
    .tp_basicsize = sizeof(Unpack),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)unpack_init,
    .tp_dealloc = unpack_dealloc,
    .tp_traverse = unpack_traverse,
    .tp_clear = unpack_clear,
    .tp_vectorcall_offset = offsetof(Unpack, vectorcall),
    .tp_call = PyVectorcall_Call,
};

/* ---- methods that write, and `.data` ------------------------------------------------------------------------------ */

/* File what is pending: groups and so on tell of every save then. */
static int
file_pending(PyObject *pending, PyObject *filing, PyObject *file)
{
    int waits = PyObject_IsTrue(pending);
    if (waits < 0) {
        return -1;
    }
    if (waits || PyList_GET_SIZE(filing) != 0) {
        PyObject *filed = call(file);
        if (filed == NULL) {
            return -1;
        }
        Py_DECREF(filed);
    }
    return 0;
}

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    PyObject *original;   /* torch's own method */
    PyObject *otherwise;  /* the route to the judgement, in Python */
    PyObject *on_class;   /* what is found on the class */
    PyObject *bound_type; /* what is made of this and an instance: `x.add_`, not called */
    PyObject *pending, *filing, *file, *groups, *foreign;
    PyObject *tensor_type, *parameter_type;
    PyObject *mode_active, *storage_id, *grad_enabled;
    PyObject *reads_itself; /* None where such a call saves nothing of what it writes to */
} Method;

#define AT(field) {#field, offsetof(Method, field)}
static const Given method_given[] = {
    AT(original), AT(otherwise), AT(on_class), AT(bound_type), AT(pending), AT(filing), AT(file), AT(groups), AT(foreign),
    AT(tensor_type), AT(parameter_type), AT(mode_active), AT(storage_id), AT(grad_enabled), AT(reads_itself), {NULL, 0},
};
#undef AT

/* Whether a call writes to memory that no save has anything to do with. 1, 0: to be judged; -1: an exception. */
static int
is_elsewhere(Method *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (file_pending(self->pending, self->filing, self->file) < 0) {
        return -1;
    }
    if (self->reads_itself != Py_None && count > 1
        && (count > 2 || !(PyLong_CheckExact(arguments[1]) || PyFloat_CheckExact(arguments[1])))) {
        int records = as_truth(call(self->grad_enabled));
        if (records != 0) {
            return records < 0 ? -1 : 0;
        }
    }
    if (PyDict_GET_SIZE(self->groups) == 0) {
        return 1;
    }
    if (count == 0 || PyDict_GET_SIZE(self->foreign) != 0) {
        return 0;
    }
    PyObject *tensor = arguments[0];
    if (!is_plain(tensor, self->tensor_type, self->parameter_type)) {
        return 0;
    }
    int mode = as_truth(call(self->mode_active));
    if (mode != 0) {
        return mode < 0 ? -1 : 0;
    }
    PyObject *storage = call_with(self->storage_id, tensor);
    if (storage == NULL) {
        return left_to_python();
    }
    int saved = PyDict_Contains(self->groups, storage);
    Py_DECREF(storage);
    if (saved != 0) {
        return saved < 0 ? -1 : 0;
    }
    PyObject *untyped = call_method(tensor, name_untyped_storage);
    if (untyped == NULL) {
        return left_to_python();
    }
    int own = as_truth(call_method(untyped, name_resizable)); /* of torch's allocator */
    Py_DECREF(untyped);
    return own < 0 ? left_to_python() : own;
}

static PyObject *
method_call(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names)
{
    Method *self = (Method *)callable;
    if (!is_made(self->original)) {
        return NULL;
    }
    int elsewhere = is_elsewhere(self, arguments, PyVectorcall_NARGS(flags));
    if (elsewhere < 0) {
        return NULL;
    }
    return PyObject_Vectorcall(elsewhere ? self->original : self->otherwise, arguments, flags, names);
}

static PyObject *
method_get(PyObject *descriptor, PyObject *instance, PyObject *owner)
{
    Method *self = (Method *)descriptor;
    if (!is_made(self->original)) {
        return NULL;
    }
    if (instance == NULL || instance == Py_None) {
        Py_INCREF(self->on_class);
        return self->on_class;
    }
    PyObject *arguments[3] = {NULL, descriptor, instance};
    return PyObject_Vectorcall(self->bound_type, arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
}

static int
method_init(Method *self, PyObject *arguments, PyObject *keywords)
{
    if (take((PyObject *)self, method_given, arguments, keywords) < 0) {
        return -1;
    }
    if (!PyList_Check(self->filing) || !PyDict_Check(self->groups) || !PyDict_Check(self->foreign)) {
        PyErr_SetString(PyExc_TypeError, "a list and dictionaries are asked for");
        return -1;
    }
    self->vectorcall = method_call;
    return 0;
}

/* dynamo finds this and not what stands on the class, and looks it up among the methods of torch.Tensor. */
static PyObject *
method_attribute(PyObject *self, void *name)
{
    PyObject *original = ((Method *)self)->original;
    return is_made(original) ? PyObject_GetAttrString(original, (const char *)name) : NULL;
}

static PyObject *
method_class(PyObject *self, void *unused)
{
    PyObject *original = ((Method *)self)->original;
    return Py_NewRef((PyObject *)Py_TYPE(original == NULL ? self : original));
}

static Py_hash_t
method_hash(PyObject *self)
{
    PyObject *original = ((Method *)self)->original;
    return is_made(original) ? PyObject_Hash(original) : -1;
}

static PyObject *
method_compare(PyObject *self, PyObject *other, int how)
{
    PyObject *original = ((Method *)self)->original;
    return is_made(original) ? PyObject_RichCompare(original, other, how) : NULL;
}

static PyGetSetDef method_attributes[] = {
    {"__class__", method_class, NULL, NULL, NULL},
    {"__name__", method_attribute, NULL, NULL, "__name__"},
    {"__objclass__", method_attribute, NULL, NULL, "__objclass__"},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef method_members[] = {
    {"original", T_OBJECT, offsetof(Method, original), READONLY, NULL},
    {"on_class", T_OBJECT, offsetof(Method, on_class), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

typedef struct {
    PyObject_HEAD
    PyObject *original; /* torch's own descriptor */
    PyObject *get, *set, *remove; /* in Python: take what is out of the ordinary */
    PyObject *pending, *filing, *file, *groups, *young;
    PyObject *tensor_type, *parameter_type;
    PyObject *storage_id, *inside_library, *watching;
    PyObject *ref; /* the type of weak references to tensors */
    PyObject *few_object;
    Py_ssize_t few;
} Data;

#define AT(field) {#field, offsetof(Data, field)}
static const Given data_given[] = {
    AT(original), AT(get), AT(set), AT(remove), AT(pending), AT(filing), AT(file), AT(groups), AT(young),
    AT(tensor_type), AT(parameter_type), AT(storage_id), AT(inside_library), AT(watching), AT(ref),
    {"few", offsetof(Data, few_object)}, {NULL, 0},
};
#undef AT

/* Take down an alias of memory in which no save lies, taken in the user's code. 1; 0: it is no such alias; -1. */
static int
enter_young(Data *self, PyObject *alias)
{
    if (!is_plain(alias, self->tensor_type, self->parameter_type)) {
        return 0;
    }
    if (file_pending(self->pending, self->filing, self->file) < 0) {
        return -1;
    }
    PyFrameObject *frame = PyEval_GetFrame();
    if (frame == NULL) {
        return 0;
    }
    PyObject *storage = call_with(self->storage_id, alias);
    if (storage == NULL) {
        return left_to_python();
    }
    int result = PyDict_Contains(self->groups, storage);
    PyCodeObject *code = NULL;
    PyObject *reference = NULL;
    if (result != 0) {
        result = result < 0 ? -1 : 0;
        goto done;
    }
    code = PyFrame_GetCode(frame);
    if (PyDict_GetItemWithError(self->inside_library, code->co_filename) != Py_False) {
        result = PyErr_Occurred() ? -1 : 0;
        goto done;
    }
    PyObject *before = PyDict_GetItemWithError(self->young, storage);
    if (before != NULL) {
        int lives = refers(PyTuple_GET_ITEM(before, 0));
        if (lives != 0) {
            result = lives < 0 ? -1 : 0;
            goto done;
        }
    } else if (PyErr_Occurred() || PyDict_GET_SIZE(self->young) >= self->few) {
        result = PyErr_Occurred() ? -1 : 0;
        goto done;
    }
    result = -1;
    reference = self->ref == (PyObject *)&_PyWeakref_RefType ? PyWeakref_NewRef(alias, NULL) : call_with(self->ref, alias);
    if (reference != NULL) {
        PyObject *entry = Py_BuildValue("(OOi)", reference, (PyObject *)code, last_instruction(frame));
        if (entry != NULL) {
            result = PyDict_SetItem(self->young, storage, entry) < 0 ? -1 : 1;
            Py_DECREF(entry);
        }
    }
done:
    Py_DECREF(storage);
    Py_XDECREF(code);
    Py_XDECREF(reference);
    return result;
}

static PyObject *
data_get(PyObject *descriptor, PyObject *instance, PyObject *owner)
{
    Data *self = (Data *)descriptor;
    if (!is_made(self->original)) {
        return NULL;
    }
    if (instance == NULL || instance == Py_None) {
        Py_INCREF(self->original);
        return self->original;
    }
    PyObject *alias = NULL;
    if (PyList_GET_SIZE(self->watching) == 0) {
        alias = Py_TYPE(self->original)->tp_descr_get(self->original, instance, owner);
        if (alias == NULL) {
            return NULL;
        }
        int entered = enter_young(self, alias);
        if (entered == 1) {
            return alias;
        }
        if (entered < 0) {
            Py_DECREF(alias);
            return NULL;
        }
    }
    /* The alias goes with it: modes and subclasses see `.data` once. */
    PyObject *arguments[5] = {NULL, descriptor, instance, owner == NULL ? Py_None : owner, alias};
    size_t count = alias == NULL ? 3 : 4;
    PyObject *result = PyObject_Vectorcall(self->get, arguments + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(alias);
    return result;
}

static int
data_set(PyObject *descriptor, PyObject *instance, PyObject *value)
{
    Data *self = (Data *)descriptor;
    if (!is_made(self->original)) {
        return -1;
    }
    PyObject *arguments[3] = {NULL, instance, value};
    size_t count = value == NULL ? 1 : 2;
    PyObject *done = PyObject_Vectorcall(
        value == NULL ? self->remove : self->set, arguments + 1, count | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int
data_init(Data *self, PyObject *arguments, PyObject *keywords)
{
    if (take((PyObject *)self, data_given, arguments, keywords) < 0) {
        return -1;
    }
    if (!PyList_Check(self->filing) || !PyList_Check(self->watching) || !PyDict_Check(self->groups)
        || !PyDict_Check(self->young) || !PyDict_Check(self->inside_library)
        || Py_TYPE(self->original)->tp_descr_get == NULL) {
        PyErr_SetString(PyExc_TypeError, "lists, dictionaries and a descriptor are asked for");
        return -1;
    }
    self->few = PyLong_AsSsize_t(self->few_object);
    return PyErr_Occurred() ? -1 : 0;
}

COLLECTED(method, method_given)
COLLECTED(data, data_given)

static PyTypeObject MethodType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchguard._native.Method",
    .tp_doc = "What stands in torch.Tensor for a method that writes.",
    .tp_basicsize = sizeof(Method),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)method_init,
    .tp_dealloc = method_dealloc,
    .tp_traverse = method_traverse,
    .tp_clear = method_clear,
    .tp_vectorcall_offset = offsetof(Method, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_descr_get = method_get,
    .tp_members = method_members,
    .tp_getset = method_attributes,
    .tp_hash = method_hash,
    .tp_richcompare = method_compare,
};

static PyTypeObject DataType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "torchguard._native.Data",
    .tp_doc = "What stands in torch.Tensor for `data`.",
    .tp_basicsize = sizeof(Data),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)data_init,
    .tp_dealloc = data_dealloc,
    .tp_traverse = data_traverse,
    .tp_clear = data_clear,
    .tp_descr_get = data_get,
    .tp_descr_set = data_set,
};

/* ---- the module -------------------------------------------------------------------------------------------------- */

static PyObject *
note_holders(PyObject *counts, PyObject *tensor)
{
    PyObject *count = PyLong_FromSsize_t(Py_REFCNT(tensor));
    if (count == NULL || PyList_Append(counts, count) < 0) {
        Py_XDECREF(count);
        return NULL;
    }
    Py_DECREF(count);
    Py_RETURN_NONE;
}

static PyMethodDef note_holders_method = {
    "note_holders", note_holders, METH_O, "Append the number of references to a tensor, as Pack counts them."
};

static PyObject *
counting(PyObject *module, PyObject *counts)
{
    if (!PyList_Check(counts)) {
        PyErr_SetString(PyExc_TypeError, "a list is asked for");
        return NULL;
    }
    return PyCFunction_New(&note_holders_method, counts);
}

static PyMethodDef methods[] = {
    {"counting", counting, METH_O, "A pack hook that appends to a list how many references there are to what is saved."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "torchguard._native",
    .m_doc = "How is an ordinary save recorded, and read, without a step of Python's?",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    struct {
        PyObject **where;
        const char *name;
    } names[] = {
        {&name_version, "_version"},   {&name_nested, "is_nested"},  {&name_grad_fn, "grad_fn"},
        {&name_base, "_base"},         {&name_is_view, "_is_view"},  {&name_sequence_nr, "_sequence_nr"},
        {&name_output_nr, "output_nr"}, {&name_detach, "detach"},     {&name_exports, "exports"},
        {&name_f_lasti, "f_lasti"},    {&name_untyped_storage, "untyped_storage"}, {&name_resizable, "resizable"},
        {&name_counter, "counter"},    {&name_expected, "expected"},
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        *names[i].where = PyUnicode_InternFromString(names[i].name);
        if (*names[i].where == NULL) {
            return NULL;
        }
    }
    if (PyType_Ready(&FieldsType) < 0 || PyType_Ready(&PackType) < 0 || PyType_Ready(&UnpackType) < 0
        || PyType_Ready(&MethodType) < 0 || PyType_Ready(&DataType) < 0) {
        return NULL;
    }
    PyObject *module = PyModule_Create(&definition);
    if (module == NULL) {
        return NULL;
    }
    if (PyModule_AddIntConstant(module, "REVISION", REVISION) < 0
        || PyModule_AddObjectRef(module, "Fields", (PyObject *)&FieldsType) < 0
        || PyModule_AddObjectRef(module, "Pack", (PyObject *)&PackType) < 0
        || PyModule_AddObjectRef(module, "Unpack", (PyObject *)&UnpackType) < 0
        || PyModule_AddObjectRef(module, "Method", (PyObject *)&MethodType) < 0
        || PyModule_AddObjectRef(module, "Data", (PyObject *)&DataType) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
